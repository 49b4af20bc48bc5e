"""Encoders: what each makes of an image, and resampling in time."""

import torch

from neurocl.spiking.encoding import Encoder, is_static, resample


def test_static_coding_is_a_view_of_the_image():
    x = torch.rand(3, 1, 4, 4)
    x_seq = Encoder(5)(x)
    assert x_seq.shape == (5, 3, 1, 4, 4)
    assert is_static(x_seq)
    assert x_seq.data_ptr() == x.data_ptr()
    assert is_static(x_seq[:, :2])


def test_poisson_coding_fires_at_the_rate_of_the_pixel():
    torch.manual_seed(0)
    x = torch.tensor([0.0, 0.25, 1.0, -0.5]).view(1, 1, 2, 2)
    rates = Encoder(4000, "poisson")(x).mean(dim=0).flatten()
    torch.testing.assert_close(rates, x.flatten(), rtol=0, atol=0.03)


def test_latency_coding_fires_once_and_earlier_for_brighter_pixels():
    x = torch.tensor([1.0, 0.6, 0.1, 0.0]).view(1, 1, 2, 2)
    spikes = Encoder(5, "latency")(x).flatten(1)
    assert spikes.sum(dim=0).tolist() == [1, 1, 1, 0]
    assert spikes.argmax(dim=0).tolist()[:3] == [0, 1, 3]


def test_event_frames_become_time_major():
    frames = torch.rand(2, 6, 2, 4, 4)
    assert torch.equal(Encoder(6)(frames)[3, 1], frames[1, 3])


def test_resampling_shortens_and_repeats():
    x_seq = torch.arange(4.0).view(4, 1, 1)
    assert resample(x_seq, 2).flatten().tolist() == [0, 1]
    assert resample(x_seq, 8).flatten().tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    static = torch.rand(2, 3).expand(4, 2, 3)
    assert is_static(resample(static, 8))
    assert torch.equal(resample(static, 8)[7], static[0])
    assert not is_static(resample(static, 1))
