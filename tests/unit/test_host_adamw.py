"""AdamW with its state on the host makes the updates of torch's, in loads of any size, and of fp32 weights for narrow
ones."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from rwkv_accel import host_adamw
from rwkv_accel.bench.harness import peak_tensor_mib
from rwkv_accel.config.schema import ModelConfig, OptimConfig, PeftConfig, TrainerConfig
from rwkv_accel.errors import UserError
from rwkv_accel.guard import UpdateGuard
from rwkv_accel.host_adamw import HostAdamW
from rwkv_accel.model.precision import Precision
from rwkv_accel.optim import build_optimizer, check_offload_strategy
from rwkv_accel.peft.apply import load_model_and_apply_peft
from rwkv_accel.state import Health
from tests.helpers import tiny_checkpoint

SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-7}
SHAPES = ((3, 5), (40,), (7, 2), (1,), (6, 6))


@pytest.fixture(params=[4, 16, 1 << 22], ids=["parameters are cut", "several loads", "one load"])
def load_values(request, monkeypatch):
    monkeypatch.setattr(host_adamw, "LOAD_VALUES", request.param)
    monkeypatch.setattr(host_adamw, "SLAB_VALUES", 50)


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def grouped(params):
    return [{"params": params[:2], "lr": 0.1, "weight_decay": 0.3}, {"params": params[2:], "lr": 0.01}]


def gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).bfloat16() for p in params]


def test_updates_are_those_of_torch(load_values):
    ours, theirs = parameters(), parameters()
    host = HostAdamW(grouped(ours), **SETTINGS)
    plain = torch.optim.AdamW(grouped(theirs), **SETTINGS, weight_decay=0.0)
    for step in range(4):
        for p, q, grad in zip(ours, theirs, gradients(ours, step)):
            # One parameter has no gradient at first.
            p.grad, q.grad = (None, None) if step < 2 and p.numel() == 40 else (grad.float(), grad.float())
        host.step()
        plain.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(host.state[p][key], plain.state[q][key], rtol=1e-6, atol=1e-9)
    assert host.masters == {}


def test_narrow_weights_follow_a_copy_in_fp32(load_values):
    narrow = parameters(torch.bfloat16)
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    host = HostAdamW(grouped(narrow), **SETTINGS)
    plain = torch.optim.AdamW(grouped(wide), **SETTINGS, weight_decay=0.0)
    for step in range(20):
        for p, q, grad in zip(narrow, wide, gradients(narrow, step)):
            p.grad, q.grad = 1e-3 * grad, (1e-3 * grad).float()
        for optimizer in (host, plain):
            for group in optimizer.param_groups:
                group["lr"] = 1e-4  # far below what bf16 tells apart
            optimizer.step()
    for p, q in zip(narrow, wide):
        torch.testing.assert_close(host.masters[p], q.detach(), rtol=1e-6, atol=1e-8)
        assert torch.equal(p, host.masters[p].bfloat16())


def test_an_update_that_is_not_finite_is_left_out(load_values):
    params = parameters()
    host = HostAdamW(grouped(params), **SETTINGS)
    guard = UpdateGuard(TrainerConfig(), Health(), torch.device("cpu"))
    guard.weigh(torch.tensor(1.0))
    for p, grad in zip(params, gradients(params, 0)):
        p.grad = grad.float()
    guard.step(host, torch.tensor(1.0))
    before = [p.detach().clone() for p in params]
    moments = [host.state[p]["exp_avg"].clone() for p in params]
    params[1].grad[3] = float("inf")
    guard.step(host, torch.tensor(float("inf")))
    for p, value, moment in zip(params, before, moments):
        assert torch.equal(p, value)
        assert torch.equal(host.state[p]["exp_avg"], moment)
        assert host.state[p]["step"].item() == 1


def test_narrow_adapters_train_as_wide_ones(tmp_path):
    """bf16-true with the state on the host is bf16-mixed to the bit, but for gradients that add up."""
    base = ModelConfig(path=str(tiny_checkpoint(tmp_path / "base.pth")))
    losses, trained = {}, {}
    for precision, offload in (("bf16-mixed", False), ("bf16-true", True)):
        model = load_model_and_apply_peft(base, PeftConfig(rank=4), precision=Precision.from_name(precision))
        params = [p for p in model.parameters() if p.requires_grad]
        for p in params:
            p.data = p.data.bfloat16().to(p.dtype)  # the same start
        optimizer = build_optimizer(model, OptimConfig(lr_init=1e-3, offload=offload))
        ids = torch.randint(1, 257, (1, 25), generator=torch.Generator().manual_seed(0))
        losses[precision] = []
        for _ in range(5):
            loss = model(ids[:, :-1], ids[:, 1:].contiguous()) / 24
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[precision].append(loss.item())
        trained[precision] = [optimizer.masters[p] if offload else p.detach() for p in params]
        assert {p.dtype for p in params} == {torch.bfloat16 if offload else torch.float32}
    assert losses["bf16-true"] == pytest.approx(losses["bf16-mixed"], rel=1e-4)
    assert losses["bf16-true"][-1] < losses["bf16-true"][0]
    for narrow, wide in zip(trained["bf16-true"], trained["bf16-mixed"]):
        torch.testing.assert_close(narrow, wide, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 1), (torch.float32, 6 / 7)])
def test_an_update_takes_what_the_planner_counts(dtype, share, monkeypatch):
    monkeypatch.setattr(host_adamw, "LOAD_VALUES", 1 << 14)
    params = [nn.Parameter(torch.ones(64, 128, dtype=dtype)) for _ in range(8)]
    host = HostAdamW(params, **SETTINGS)
    for p in params:
        p.grad = torch.ones_like(p)
    host.step()  # makes the state
    counted = share * host_adamw.device_bytes(sum(p.numel() for p in params))  # fp32 gradients need no copy
    assert counted == share * 7 * 4 * (1 << 14)
    assert peak_tensor_mib(host.step, "cpu") * 2**20 == pytest.approx(counted, rel=0.02)


def test_the_recipe_chooses_it():
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimConfig(offload=True, betas=(0.8, 0.9), eps=1e-5))
    assert isinstance(optimizer, HostAdamW)
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.8, 0.9), 1e-5)
    assert isinstance(build_optimizer(model, OptimConfig()), torch.optim.AdamW)
    with pytest.raises(ValueError, match="sgd has none"):
        OptimConfig(offload=True, optimizer="sgd")


def test_strategies_that_shard_refuse_it():
    for strategy in ("single", "ddp"):
        check_offload_strategy(OptimConfig(offload=True), strategy)
    check_offload_strategy(OptimConfig(), "zero3")
    with pytest.raises(UserError, match=r"zero2, .* take accelerate_configs/zero2_offload\.yaml"):
        check_offload_strategy(OptimConfig(offload=True), "zero2")
    with pytest.raises(UserError, match=r"fsdp2, .* take ddp"):
        check_offload_strategy(OptimConfig(offload=True), "fsdp2")


def test_on_a_gpu_copies_and_computation_wait_for_each_other(monkeypatch):
    """The order in which a GPU is told what waits for what, with stand-ins for its streams."""
    log, running = [], ["compute"]

    class Stream:
        names = iter(("in", "out"))

        def __init__(self, device=None, name=None):
            self.name = name or next(Stream.names)

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event):
            log.append(f"{self.name} waits for {event}")

        def record_event(self):
            return f"event {len(log)} of {self.name}"

    @contextmanager
    def within(stream):
        running.append(stream.name)
        yield
        running.pop()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(name="compute"))
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(host_adamw, "LOAD_VALUES", 10)
    monkeypatch.setattr(HostAdamW, "_lanes_of", lambda self, device: lanes)
    monkeypatch.setattr(host_adamw, "adamw", lambda *_, **__: log.append(f"update on {running[-1]}"))
    lanes = host_adamw._CudaLanes(torch.device("cpu"))
    param = nn.Parameter(torch.ones(30))
    param.grad = torch.ones(30)
    HostAdamW([param], **SETTINGS).step()
    assert log == [
        "in waits for compute", "in waits for out",
        "compute waits for in", "update on compute", "out waits for compute",
        "compute waits for in", "update on compute", "out waits for compute",
        "in waits for event 5 of out",
        "compute waits for in", "update on compute", "out waits for compute",
        "compute waits for out",
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_state_stays_on_the_host(load_values):
    ours, theirs = ([p.detach().cuda().requires_grad_() for p in parameters()] for _ in range(2))
    host = HostAdamW(grouped(ours), **SETTINGS)
    plain = torch.optim.AdamW(grouped(theirs), **SETTINGS, weight_decay=0.0, fused=True)
    for step in range(4):
        for p, q, grad in zip(ours, theirs, gradients(ours, step)):
            p.grad, q.grad = grad.float().cuda(), grad.float().cuda()
        host.step()
        plain.step()
    host.settle()
    for p, q in zip(ours, theirs):
        assert host.state[p]["exp_avg"].is_pinned()
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(host.state[p]["exp_avg_sq"], plain.state[q]["exp_avg_sq"].cpu())
