"""The formula of a layout's traffic is what its ranks count, byte for byte, for every network, layout and decoder."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from harness.costs.frames_traffic import FramesTrace, frames_bytes, trace_frames
from harness.costs.traffic import NetworkTrace, TokenStreams, sent_bytes, trace_network
from harness.costs.vae_traffic import DecodeTrace, decode_bytes, trace_decode
from models.attention import math_attention
from models.components import Conditioning
from models.flux import PLAN as FLUX_PLAN
from models.flux import Flux, FluxConfig
from models.wan import PLAN as WAN_PLAN
from models.wan import Wan, WanConfig
from tests.fixtures.parallel import decoders
from tests.fixtures.parallel.decoders import CASES, VIDEOS
from tests.fixtures.parallel.layouts import SIZES, cases, ranks_found
from tests.fixtures.parallel.networks import TINY


@cache
def traced(name: str) -> NetworkTrace:
    """Return a network's trace."""
    return trace_network(lambda: TINY[name].make(math_attention), TINY[name].plan, TINY[name].inputs)


@cache
def decode_traced(name: str) -> DecodeTrace:
    """Return a decoder's trace."""
    return trace_decode(CASES[name].make, CASES[name].latent())


def counted(found: dict[str, torch.Tensor], what: str) -> dict[str, int]:
    """Return the bytes by kind that a rank reported of one case."""
    return {name.removeprefix(f"{what} "): int(x) for name, x in found.items() if name.startswith(f"{what} ")}


@pytest.mark.parametrize(("ranks", "more"), SIZES)
def test_a_layout_sends_what_the_formula_says(ranks: int, more: bool) -> None:
    for name, layout in cases(ranks, more):
        said = sent_bytes(traced(name), layout.degrees, layout.dtype.itemsize, layout.gather)
        assert said
        for found in ranks_found(ranks, more):
            assert said == counted(found, f"{name} {layout}"), (name, layout)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (3, 4))])
def test_decoding_sends_what_the_formula_says(ranks: int, name: str) -> None:
    for index, found in enumerate(decoders.ranks_found(ranks)):
        for dtype in CASES[name].dtypes:
            said = decode_bytes(decode_traced(name), ranks, index, dtype.itemsize)
            assert said == counted(found, f"{name} {dtype}")


@cache
def video_traced(name: str) -> FramesTrace:
    """Return the trace of a decoder for the video that is sharded by frames."""
    return trace_frames(VIDEOS[name].make, VIDEOS[name].latent())


@pytest.mark.parametrize("name", VIDEOS)
@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (3, 4))])
def test_decoding_by_frames_sends_what_the_formula_says(ranks: int, name: str) -> None:
    for index, found in enumerate(decoders.ranks_found(ranks)):
        said = frames_bytes(video_traced(name), ranks, index, torch.float32.itemsize)
        assert said == counted(found, f"{name} by frames torch.float32")


def wan_inputs(text_tokens: int) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    """A video of 3 x 3 x 5 tokens and a text, by hand."""
    latent, tau_B, condition = TINY["wan"].inputs
    return latent, tau_B, replace(condition, prompt_embeds=torch.zeros(2, text_tokens, 24))


@pytest.mark.parametrize("text_tokens", [7, 45])
def test_a_text_as_long_as_the_video_is_still_held_whole(text_tokens: int) -> None:
    config = WanConfig(2, 4, 12, 40, 4, text_channels=24, time_channels=32)
    norms = trace_network(lambda: Wan(config), WAN_PLAN, wan_inputs(text_tokens)).sharded_norms
    of_video, of_text = TokenStreams(2, (45,)), TokenStreams(2, (text_tokens,), sharded=False)
    block = (of_video, of_video, of_video, of_text)  # q and k of the video, then its q and the text's k
    assert norms == block * config.depth


def test_full_size_flux_by_hand() -> None:
    """FLUX.1 [dev] at 1024 x 1024 pixels: 19 double and 38 single blocks over 512 text and 4096 image tokens."""
    condition = Conditioning(torch.empty(1, 512, 4096), pooled=torch.empty(1, 768), scale=torch.empty(1))
    inputs = (torch.empty(1, 16, 128, 128), torch.empty(1), condition)
    flux = trace_network(lambda: Flux(FluxConfig(guidance=True)), FLUX_PLAN, inputs)
    width, part = 24 * 128, 4608 // 4 * 24 * 128 * 2
    gathered = (
        (512 + 4096 + 4608) // 4 * width * 2 * 3
    )  # of both streams after the double blocks, and of the joined one
    assert sent_bytes(flux, (1, 1, 1, 1, 4), 2) == {"all_to_all": 57 * 4 * part * 3 // 4, "all_gather": gathered}
    assert sent_bytes(flux, (1, 1, 1, 4, 1), 2) == {"shift": 57 * 3 * 2 * part, "all_gather": gathered}
    assert sent_bytes(flux, (1, 1, 1, 4, 1), 2, gather=True) == {"all_gather": 57 * 3 * 2 * part + gathered}
    summed = (19 * 2 + 38) * 4608 * width * 2  # attention and feed-forward of both streams; once in a single block
    assert sent_bytes(flux, (1, 1, 4, 1, 1), 2) == {"all_reduce": 2 * summed * 3 // 4}
    assert sent_bytes(flux, (1, 2, 1, 1, 1), 2) == {"all_gather": 4 * 16 * 128 * 128}
    assert sent_bytes(flux, (8, 1, 1, 1, 1), 2) == {}


@pytest.mark.parametrize("name", TINY)
def test_a_network_runs_after_one_of_its_sizes_was_traced(name: str) -> None:
    """Position tables are cached by size, but must not be cached without their numbers."""
    trace_network(lambda: TINY[name].make(math_attention), TINY[name].plan, TINY[name].inputs)
    with torch.inference_mode():
        assert TINY[name].build(math_attention)(*TINY[name].inputs).isfinite().all()
