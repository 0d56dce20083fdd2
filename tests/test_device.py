"""Which device, precision and learning rate a run gets."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llm.config import TrainConfig
from llm.training.device import Machine, check_kernels, find_device, find_machine
from llm.training.loop import default_out
from llm.training.optim import learning_rate, make_optimizer, split_by_decay


def test_a_gpu_without_kernels_is_found_and_the_remedy_named():
    with pytest.raises(ValueError, match=r"capability 6\.1.*sm_80.*install a torch build"):
        check_kernels((6, 1), ["sm_80", "sm_90"])


@pytest.mark.parametrize(
    ("capability", "built_for"),
    [((8, 0), ["sm_80"]), ((8, 9), ["sm_80", "sm_90"]), ((12, 0), ["sm_90", "compute_90"]), ((9, 0), ["sm_90a"])],
)
def test_kernels_of_the_same_major_version_or_translatable_ones_will_do(capability, built_for):
    check_kernels(capability, built_for)


def test_kernels_for_a_later_minor_version_will_not_do():
    with pytest.raises(ValueError, match="capability"):
        check_kernels((8, 0), ["sm_86"])


def test_an_unknown_or_absent_device_is_named():
    with pytest.raises(ValueError, match="'tpu9000' is no device"):
        find_device("tpu9000")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="finds none here"):
            find_device("cuda")


def test_the_cpu_is_never_compiled_for_unless_asked():
    config = TrainConfig(device="cpu")
    assert not find_machine(config).compile
    assert find_machine(replace(config, compile="on")).compile


def test_precision_follows_the_wish():
    assert find_machine(TrainConfig(device="cpu", precision="bf16")).bf16
    machine = find_machine(TrainConfig(device="cpu", precision="fp32"))
    with machine.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32


def test_a_share_of_peak_is_given_only_where_the_peak_is_known(monkeypatch):
    assert Machine(torch.device("cpu"), bf16=True, compile=False).peak_flops is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert Machine(torch.device("cuda"), bf16=True, compile=True).peak_flops == 756e12
    assert Machine(torch.device("cuda"), bf16=False, compile=True).peak_flops is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40")
    assert Machine(torch.device("cuda"), bf16=True, compile=True).peak_flops == 181e12


def test_gpus_of_another_maker_are_taken_as_they_are():
    check_kernels((9, 4), ["gfx90a", "gfx942"])


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    config = TrainConfig(steps=110, warmup_steps=10, max_lr=1.0, min_lr=0.1)
    rates = [learning_rate(step, config) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[59] == pytest.approx(0.1 + 0.9 * 0.5)  # half-way down
    assert rates[34] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert rates[-1] == pytest.approx(0.1)
    assert learning_rate(1, replace(config, warmup_steps=0)) < 1.0


class WithBias(torch.nn.Linear):
    """A layer that names a parameter of its own."""

    no_weight_decay = ("table",)

    def __init__(self):
        super().__init__(3, 3)
        self.table = torch.nn.Parameter(torch.zeros(3, 3))


def test_what_a_module_names_does_not_decay():
    model = torch.nn.Sequential(WithBias(), torch.nn.Linear(3, 3))
    decaying, others = split_by_decay(model)
    assert [id(p) for p in decaying] == [id(model[0].weight), id(model[1].weight)]
    assert {id(p) for p in others} == {id(model[0].bias), id(model[0].table), id(model[1].bias)}


def test_matrices_decay_and_vectors_do_not():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.5))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in model.parameters()] == [0.5, 0, 0, 0]


def test_the_sample_run_does_not_stand_in_the_way_of_the_full_job():
    assert default_out("baseline", Path("data/tinystories")) == Path("runs/baseline")
    assert default_out("baseline", Path("data/sample")) == Path("runs/baseline-sample")
