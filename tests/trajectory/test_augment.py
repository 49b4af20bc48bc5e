"""Random changes keep distances, times and masks as they say, and follow their generator."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from neurocl.errors import UserError
from neurocl.trajectory.augment import (
    augmented,
    centres,
    cropped,
    dropped,
    jittered,
    reflected,
    resized,
    rotated,
    shortened,
    thinned,
)
from neurocl.trajectory.crowd import simulate
from neurocl.trajectory.scenes import Scenes
from neurocl.trajectory.windows import cut
from tests.trajectory.scene_examples import walks


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return cut(simulate("plaza", 0, rows=60), 8, 12)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def distances(scenes: Scenes) -> torch.Tensor:
    last = scenes.past[:, :, -1].double()
    return torch.cdist(last, last)


def test_rotation_keeps_distances_and_the_centre_and_turns_scenes_apart(scenes: Scenes) -> None:
    turned = rotated(scenes, seeded())
    assert torch.allclose(distances(turned), distances(scenes), atol=1e-4)
    assert torch.allclose(centres(turned), centres(scenes), atol=1e-4)
    before, after = (part.future[:, 0, -1] - part.past[:, 0, -1] for part in (scenes, turned))
    angle = torch.atan2(after[:, 1], after[:, 0]) - torch.atan2(before[:, 1], before[:, 0])
    assert torch.unique((angle % (2 * math.pi)).round(decimals=2)).numel() > len(scenes) / 2
    assert torch.equal(turned.past_mask, scenes.past_mask)


def test_a_small_rotation_stays_within_its_degrees(scenes: Scenes) -> None:
    turned = rotated(scenes, seeded(), 5.0)
    before, after = (part.future[:, 0, -1] - part.past[:, 0, 0] for part in (scenes, turned))
    cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=1)
    assert (cosine[before.norm(dim=1) > 0.1] > math.cos(math.radians(5.01))).all()


def test_resizing_multiplies_all_distances_of_a_scene_by_one_factor_between_the_bounds(scenes: Scenes) -> None:
    other = resized(scenes, seeded(), 2.0)
    assert torch.allclose(centres(other), centres(scenes), atol=1e-4)
    before, after = distances(scenes), distances(other)
    apart = (before > 0.5) & scenes.agent_mask[:, :, None] & scenes.agent_mask[:, None]
    factors = (after / before.clamp(min=1e-9)).masked_fill(~apart, torch.nan)
    middle = factors.flatten(1).nanmedian(dim=1).values
    assert torch.allclose(factors[apart], middle[:, None, None].expand_as(factors)[apart], atol=1e-3)
    assert ((middle > 0.5) & (middle < 2)).all()
    assert 0.3 < (middle > 1).double().mean() < 0.7
    ahead, usual = ((part.future - part.past[:, :, -1:])[:, 0, -1].norm(dim=-1) for part in (other, scenes))
    assert torch.allclose(ahead, middle.float() * usual, atol=1e-3)
    with pytest.raises(UserError, match="resize must be at least 1"):
        augmented(scenes, seeded(), resize=0.5)


def test_reflection_on_a_field_keeps_people_on_it(scenes: Scenes) -> None:
    field = (40.0, 30.0)
    moved = Scenes(**(vars(scenes) | {"past": scenes.past + 14, "future": scenes.future + 14}))
    mirrored = reflected(moved, seeded(), field)
    options = []
    for x in (False, True):
        for y in (False, True):
            past = moved.past.clone()
            past[..., 0] = 40 - past[..., 0] if x else past[..., 0]
            past[..., 1] = 30 - past[..., 1] if y else past[..., 1]
            options.append((past - mirrored.past).abs().amax(dim=(1, 2, 3)) < 1e-4)
    chosen = torch.stack(options)
    assert chosen.any(dim=0).all()
    assert chosen.any(dim=1).all()


def test_reflection_without_a_field_mirrors_half_of_the_scenes_at_their_centre(scenes: Scenes) -> None:
    mirrored = reflected(scenes, seeded())
    same = (mirrored.past - scenes.past).abs().amax(dim=(1, 2, 3)) < 1e-4
    assert 0.2 < same.double().mean() < 0.8
    assert torch.allclose(mirrored.past[..., 0], scenes.past[..., 0], atol=1e-4)
    assert torch.allclose(centres(mirrored), centres(scenes), atol=1e-4)


def test_jitter_shakes_only_what_was_observed(scenes: Scenes) -> None:
    shaken = jittered(scenes, seeded(), 0.1)
    change = shaken.past - scenes.past
    assert change[~scenes.past_mask].abs().max() == 0
    assert change[scenes.past_mask].std().item() == pytest.approx(0.1, rel=0.05)
    assert torch.equal(shaken.future, scenes.future)


def test_dropping_hides_that_share_but_no_last_position(scenes: Scenes) -> None:
    hidden = dropped(scenes, seeded(), 0.3)
    assert not (hidden.past_mask & ~scenes.past_mask).any()
    complete = scenes.past_mask.all(dim=2)
    assert hidden.past_mask[complete][:, -1].all()
    assert hidden.past_mask[complete][:, :-1].double().mean().item() == pytest.approx(0.7, abs=0.02)
    assert hidden.past[~hidden.past_mask].abs().max() == 0
    assert (hidden.past_mask.any(dim=2) == scenes.past_mask.any(dim=2)).all()
    assert torch.equal(dropped(scenes, seeded(), 1.0).past_mask.sum(dim=2), scenes.agent_mask.long())


def test_shortening_hides_the_first_steps(scenes: Scenes) -> None:
    short = shortened(scenes, seeded(), 1.0)
    complete = scenes.past_mask.all(dim=2)
    mask = short.past_mask[complete].long()
    assert (mask.diff(dim=1) >= 0).all()
    assert set(mask.sum(dim=1).tolist()) == set(range(1, 8))
    assert torch.equal(shortened(scenes, seeded(), 0.0).past_mask, scenes.past_mask)


def test_everything_together_follows_the_generator_and_leaves_the_input(scenes: Scenes) -> None:
    before = scenes.past.clone()
    options = {"rotation": 360.0, "drop": 0.1, "shorten": 0.1, "jitter": 0.02}
    one, other = (augmented(scenes, seeded(), reflection=True, **options) for _ in range(2))
    assert torch.equal(one.past, other.past)
    assert torch.equal(one.past_mask, other.past_mask)
    assert torch.equal(scenes.past, before)
    assert not torch.equal(one.past, scenes.past)
    assert augmented(scenes, seeded()) is scenes


@pytest.mark.parametrize(
    "options", [{"drop": 1.5}, {"shorten": -0.1}, {"rotation": -1.0}, {"absent": 2.0}, {"jitter": math.nan}]
)
def test_values_out_of_range_are_mistakes(scenes: Scenes, options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))} must be"):
        augmented(scenes, seeded(), **options)


def test_agents_are_left_out_but_never_all_that_count() -> None:
    scenes = walks(200, 5)
    few = thinned(scenes, seeded(), 0.6)
    assert bool(few.target_mask.any(dim=1).all())
    # Of five agents one certainly stays, the other four in 40 per cent of the scenes.
    assert few.agent_mask.float().sum(dim=1).mean() == pytest.approx(1 + 4 * 0.4, abs=0.2)
    assert torch.equal(few.past_mask, few.agent_mask[..., None].expand_as(few.past_mask))
    assert torch.equal(few.future_mask, few.agent_mask[..., None].expand_as(few.future_mask))
    assert torch.equal(few.past[few.past_mask], scenes.past[few.past_mask])
    assert torch.equal(few.agent_mask.sum(dim=0) > 0, torch.ones(5, dtype=torch.bool))  # whoever stays is drawn
    assert augmented(scenes, seeded(), absent=0.0) is scenes


def test_full_scenes_are_cut_to_a_target_and_those_around_it() -> None:
    scenes = walks(40, 9)
    targets = scenes.target_mask.clone()
    targets[:, 4:] = False
    scenes = replace(scenes, target_mask=targets)
    few = cropped(scenes, 3, torch.Generator().manual_seed(0))
    assert few.num_agents == 3
    assert bool(few.target_mask.any(dim=1).all())
    assert bool((few.target_mask.int().diff(dim=1) <= 0).all())  # targets first
    place = scenes.past[:, :, -1]
    for row in range(len(scenes)):
        kept = few.agent_id[row]
        torch.testing.assert_close(few.future[row], scenes.future[row, kept])
        # One of the kept targets has no other agent nearer to it than those that were kept.
        apart = torch.cdist(place[row], place[row])
        nearest = apart.argsort(dim=1)[:, :3].sort(dim=1).values
        assert any(torch.equal(nearest[agent], kept) for agent in kept if targets[row, agent])
    assert cropped(scenes, 9, torch.Generator()) is scenes
