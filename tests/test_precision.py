"""Scripts compute in what the machine is fast in, unless they are told otherwise."""

import argparse
from functools import partial

import pytest
import torch

from minimonkey.scripts import precision
from minimonkey.scripts.training.optimizers import Muon
from minimonkey.scripts.training.recipe import Recipe


@pytest.fixture
def processor_with(monkeypatch):
    """Let the processor be x86 with these units."""

    def set_units(bf16: bool, amx: bool, cap: str | None = None, machine: str = "x86_64") -> None:
        precision.has_fast_bfloat16.cache_clear()
        monkeypatch.setattr(precision.platform, "machine", lambda: machine)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        if cap is None:
            monkeypatch.delenv(precision.ONEDNN_CAP, raising=False)
        else:
            monkeypatch.setenv(precision.ONEDNN_CAP, cap)

    yield set_units
    precision.has_fast_bfloat16.cache_clear()


@pytest.mark.parametrize(
    ("bf16", "amx", "cap", "expected"),
    [
        (False, False, None, torch.float32),
        (True, False, None, torch.bfloat16),
        (False, True, None, torch.bfloat16),
        (True, True, "AVX2", torch.float32),
        (True, True, "avx512_core", torch.float32),
        (True, True, "AVX512_CORE_AMX", torch.bfloat16),
    ],
)
def test_a_processor_without_units_computes_in_float32(processor_with, capsys, bf16, amx, cap, expected):
    processor_with(bf16, amx, cap)
    assert precision.fast_dtype("cpu") == expected
    assert precision.choose_dtype("auto", torch.device("cpu")) == expected
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(expected).removeprefix("torch.") in said


@pytest.mark.parametrize("slowdown", [0.5, 20])
def test_other_devices_are_measured_once(processor_with, monkeypatch, slowdown):
    processor_with(False, False, machine="arm64")
    measured = []
    seconds = {torch.float32: 1.0, torch.bfloat16: slowdown}
    monkeypatch.setattr(precision, "_seconds", lambda device, dtype: measured.append(dtype) or seconds[dtype])
    for _ in range(3):
        assert precision.fast_dtype("cpu") == (torch.bfloat16 if slowdown < 1 else torch.float32)
    assert len(measured) == 2


def test_a_measurement_takes_some_time():
    assert 0 < precision._seconds("cpu", torch.float32) < 60


def test_a_given_type_is_obeyed(processor_with, capsys):
    processor_with(False, False)
    assert precision.choose_dtype("bfloat16", "cpu") == torch.bfloat16
    assert precision.choose_dtype("float16", "cpu") == torch.float16
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match="got 'bf16'"):
        precision.choose_dtype("bf16", "cpu")


def test_the_option_is_explained():
    parser = argparse.ArgumentParser()
    precision.add_dtype_argument(parser, "of computation; ")
    assert parser.parse_args([]).dtype == "auto"
    assert "of computation; auto: bfloat16 where" in " ".join(parser.format_help().split())


def recipe(**fields) -> Recipe:
    return Recipe(model=".", output_dir="out", data={}, learning_rate=1e-3, use_cpu=True, **fields)


@pytest.mark.parametrize("is_fast", [True, False])
def test_recipes_choose_by_the_machine(processor_with, is_fast):
    processor_with(is_fast, is_fast)
    automatic = recipe(dtype="auto")
    assert (automatic.dtype, automatic.bf16) == ("bfloat16" if is_fast else "float32", is_fast)
    assert recipe().dtype == "float32"
    given = recipe(dtype="bfloat16", bf16=False)
    assert (given.dtype, given.bf16) == ("bfloat16", False)


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("shape", [(8, 24), (24, 8)], ids=str)
def test_muon_is_that_of_torch_and_computes_in_the_fast_type(processor_with, shape, is_fast):
    processor_with(is_fast, is_fast)
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(value) for value in torch.randn(shape).expand(2, *shape).clone())
    optimizers = (
        Muon([ours], lr=0.1, weight_decay=0.01),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(shape)
        for optimizer in optimizers:
            optimizer.step()
    if is_fast:
        assert torch.equal(ours, theirs)
    else:
        assert not torch.equal(ours, theirs)
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02)


def test_weights_take_half_of_the_memory_that_is_free():
    storage = partial(precision.choose_storage, 10**9)
    assert storage(torch.float32, 8 * 10**9) is None
    assert storage(torch.float32, 5 * 10**9) == "bfloat16"
    assert storage(torch.bfloat16, 3 * 10**9) == "int8"
    assert storage(torch.float32, 1.5 * 10**9) == "int4"
    with pytest.raises(ValueError, match=r"1 billion weights takes 0.6 GiB in 4 bits.* 0.9 GiB are free"):
        storage(torch.bfloat16, 10**9)
