"""The autoregressive prior: it looks back only, scores what it samples, and learns."""

from __future__ import annotations

import torch

from neurocl.trajectory.autoregressive import AutoregressivePrior
from tests.trajectory.scene_examples import NUM_CODES, context_of, trunk, walks


def test_the_autoregressive_prior_does_not_look_ahead_and_scores_what_it_samples() -> None:
    torch.manual_seed(0)
    prior = AutoregressivePrior(trunk(), NUM_CODES)
    memory = prior.prepare(context_of(walks()))
    codes = torch.randint(0, NUM_CODES, (2, 3, 4, 12))
    later = codes.clone()
    later[..., 6:] = (later[..., 6:] + 1) % NUM_CODES
    first, second = (prior(value[..., :-1], memory) for value in (codes, later))
    assert first.shape == (2, 3, 4, 12, NUM_CODES)
    torch.testing.assert_close(first[..., :7, :], second[..., :7, :])
    log_p = first[0].log_softmax(dim=-1).gather(-1, codes[0][..., None])[..., 0]
    torch.testing.assert_close(prior.loss(codes[0], memory), -log_p.mean())


def test_the_autoregressive_prior_learns_and_samples_with_a_seed() -> None:
    torch.manual_seed(0)
    scenes = walks(12, 3)
    context = context_of(scenes)
    codes = (torch.arange(12) + torch.where(scenes.past[:, :, -1, 0] > 0, 2, 9)[..., None]) % NUM_CODES
    prior = AutoregressivePrior(trunk(), NUM_CODES)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=5e-3)
    for _ in range(100):
        loss = prior.loss(codes, prior.prepare(context))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prior.eval()
    memory = prior.prepare(context)
    first, again = (prior.sample(memory, (5, 12, 3, 12), generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, again)
    # After the first code all others follow.
    assert ((first[..., 1:] - first[..., :-1]) % NUM_CODES == 1).float().mean() > 0.9
    assert (prior.sample(memory, (1, 12, 3, 12), temperature=0.0) == codes).float().mean() > 0.8
