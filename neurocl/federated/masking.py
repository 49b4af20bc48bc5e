"""What secure summation is made of: fixed-point numbers, masks, keys, shares of secrets, and sealed boxes.

``L`` numbers in a vector, ``n`` clients. Secrets are 16 bytes, from the operating system's generator. Everything else
is derived from them: keys with HKDF-SHA256, masks as the key stream of ChaCha20. Numbers are added modulo 2^64.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from neurocl.errors import UserError
from neurocl.federated.payload import PayloadError

try:
    from Crypto.Protocol.SecretSharing import Shamir
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError:
    raise UserError("secure summation needs cryptography and PyCryptodome: pip install 'neurocl[secure]'") from None

Words = NDArray[np.uint64]

SECRET_BYTES = 16
KEY_BYTES = 32
NONCE_BYTES, TAG_BYTES = 12, 16


class MaskingError(PayloadError):
    """A key, box or share that cannot be right: whoever finds it takes no further part in the round."""


def fixed_point(values: NDArray[np.float64], bits: int, parts: int) -> Words:
    """Numbers in steps of 2^-bits, as integers modulo 2^64.

    Args:
        values: any shape.
        bits: after the binary point.
        parts: how many such arrays are added at most; their sum must stay below 2^62.

    Raises:
        MaskingError: numbers that are not finite, or too large for a sum of so many.
    """
    if not np.isfinite(values).all():
        raise MaskingError("NaN and infinity cannot be summed securely")
    largest = 2.0 ** (62 - bits) / parts
    if np.abs(values).max(initial=0.0) >= largest:
        raise MaskingError(
            f"secure summation over {parts} clients takes numbers (times their weight) below {largest:.3g}; "
            "choose fewer secure_sum.bits"
        )
    return np.rint(values * 2.0**bits).astype(np.int64).view(np.uint64)


def real_numbers(words: Words, bits: int) -> NDArray[np.float64]:
    """What :func:`fixed_point` encoded, or a sum of such."""
    return words.view(np.int64) / 2.0**bits


def fresh_secret() -> bytes:
    """16 bytes that nobody can guess, whatever the run's seed."""
    return os.urandom(SECRET_BYTES)


def derived(secret: bytes, label: str, context: bytes = b"") -> bytes:
    """A key of 32 bytes for one purpose."""
    info = b"neurocl secure sum, " + label.encode() + b"\0" + context
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


def _private_key(secret: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(derived(secret, "private key"))


def public_key(secret: bytes) -> bytes:
    """The X25519 public key of a secret, 32 bytes."""
    return _private_key(secret).public_key().public_bytes_raw()


def agreed(secret: bytes, public: bytes) -> bytes:
    """What two owners of secrets get from their own and the other's public key, 32 bytes.

    Raises:
        MaskingError: a public key that agrees on the same with everybody.
    """
    try:
        return _private_key(secret).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise MaskingError("a public key is of no use: it would agree on the same key with everybody") from None


def mask(key: bytes, length: int) -> Words:
    """The first L words of the key stream of a key that serves once."""
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(8 * length)), dtype="<u8").astype(np.uint64, copy=False)


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares of 16 bytes, one for each of n; ``threshold`` of them tell the secret, fewer nothing."""
    return [bytes(share) for _, share in Shamir.split(threshold, count, secret, False)]


def joined(shares: Mapping[int, bytes]) -> bytes:
    """The secret of exactly ``threshold`` shares, by their place in the list of :func:`split`, from 0.

    Shares that do not belong together give another secret, which the caller has to notice.
    """
    return bytes(Shamir.combine([(place + 1, share) for place, share in shares.items()], False))


def seal(key: bytes, text: bytes, about: bytes) -> bytes:
    """A box that only the key opens and that shows any change: nonce, ciphertext and tag, 28 bytes more than the text.

    Args:
        key: 32 bytes.
        text: what is inside.
        about: what the box belongs to; needed to open it.
    """
    nonce = os.urandom(NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, text, about)


def opened(key: bytes, box: bytes, about: bytes) -> bytes:
    """What is in a box.

    Raises:
        MaskingError: another key, another purpose, or a box that was changed.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(box[:NONCE_BYTES], box[NONCE_BYTES:], about)
    except InvalidTag:
        raise MaskingError("a sealed share was changed, or is not meant for this round and client") from None
