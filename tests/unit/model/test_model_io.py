"""Checkpoint files: round trips, streaming load, refusals, atomic saves, digests."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rwkv_accel.errors import UserError
from rwkv_accel.model.config import RWKV7Config, parameter_shapes
from rwkv_accel.model.io import checkpoint_digest, load_model, read_checkpoint, save_checkpoint
from rwkv_accel.model.precision import Precision

FP32 = Precision.from_name("32-true")
MIXED = Precision.from_name("bf16-mixed")
SUFFIXES = (".pth", ".safetensors")


@pytest.fixture
def tensors(tiny_config, tensors_of):
    return tensors_of(tiny_config, dtype=torch.float32)


def with_layer0_value(config):
    return RWKV7Config(**{**config.__dict__, "has_layer0_value": True})


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("layer0_value", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(tmp_path, tiny_config, tensors_of, suffix, layer0_value, dtype):
    config = with_layer0_value(tiny_config) if layer0_value else tiny_config
    tensors = tensors_of(config, dtype=dtype)
    path = save_checkpoint(tensors, tmp_path / f"model{suffix}")
    checkpoint = read_checkpoint(path)
    assert checkpoint.config == config
    assert checkpoint.shapes == parameter_shapes(config)
    assert set(checkpoint) == set(tensors)
    assert all(torch.equal(checkpoint[name], tensors[name]) for name in tensors)
    model = load_model(path, FP32, wkv_backend="reference")
    assert (model.config, model.compute_dtype, model.wkv_backend) == (config, torch.float32, "reference")
    state_dict = model.state_dict()
    assert set(state_dict) == set(tensors)
    assert all(torch.equal(state_dict[name], tensors[name].float()) for name in tensors)
    assert not any(buffer.requires_grad for buffer in model.buffers())
    again = save_checkpoint(state_dict, tmp_path / f"again{suffix}")
    saved = read_checkpoint(again)
    assert all(torch.equal(saved[name], tensors[name].float()) for name in tensors)


def test_precision_sets_the_dtypes(tmp_path, tensors):
    path = save_checkpoint(tensors, tmp_path / "model.pth")
    model = load_model(path, MIXED)
    assert model.compute_dtype == torch.bfloat16
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.head.weight, tensors["head.weight"].bfloat16())
    with pytest.raises(ValueError, match="unknown precision 'fp16'; use one of 32-true, bf16-mixed, 16-mixed, bf16"):
        Precision.from_name("fp16")


def test_deepspeed_prefix_and_wrapper_and_time_state(tmp_path, tiny_config, tensors):
    prefixed = {f"_forward_module.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"model": prefixed, "step": 3}, tmp_path / "wrapped.pth")
    save_file(prefixed, tmp_path / "prefixed.safetensors")
    for name in ("wrapped.pth", "prefixed.safetensors"):
        state_dict = load_model(tmp_path / name, FP32).state_dict()
        assert all(torch.equal(state_dict[key], tensors[key]) for key in tensors)

    states = {f"blocks.{i}.att.time_state": torch.randn(2, 32, 32) for i in range(tiny_config.n_layer)}
    path = save_checkpoint(tensors | states, tmp_path / "tuned.pth")
    model = load_model(path, FP32)
    assert torch.equal(model.blocks[2].att.time_state, states["blocks.2.att.time_state"])
    assert torch.equal(model.fresh_state(2).wkv[1][1], states["blocks.1.att.time_state"])
    states.popitem()
    path = save_checkpoint(tensors | states, tmp_path / "two_states.pth")
    with pytest.raises(UserError, match=r"1 missing \(blocks\.2\.att\.time_state\)"):
        load_model(path, FP32)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_loading_never_writes_to_the_file(tmp_path, tensors, suffix):
    """Weights that keep their dtype share the file's pages; training them must stay private."""
    path = save_checkpoint(tensors, tmp_path / f"model{suffix}")
    before = path.read_bytes()
    model = load_model(path, FP32)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)
    other = load_model(path, FP32)
    assert path.read_bytes() == before
    assert torch.equal(other.head.weight, tensors["head.weight"])
    assert torch.equal(model.head.weight, tensors["head.weight"] + 1)


class Doubled(nn.Module):
    """Stands for a quantised layer: takes a weight when it is built, computes something else."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("packed", 2 * weight)

    def forward(self, x):
        return x @ self.packed.T


def test_transform_sees_each_tensor_once_and_may_replace_it(tmp_path, tensors):
    path = save_checkpoint(tensors, tmp_path / "model.pth")
    seen = []

    def transform(module_name, parameter_name, tensor):
        seen.append(f"{module_name}.{parameter_name}".removeprefix("."))
        if module_name.endswith("ffn.key"):
            return Doubled(tensor)
        if parameter_name == "w0":
            return tensor.to(torch.float64)
        return None

    model = load_model(path, MIXED, transform=transform)
    assert sorted(seen) == sorted(tensors)
    assert isinstance(model.blocks[1].ffn.key, Doubled)
    assert torch.equal(model.blocks[1].ffn.key.packed, 2 * tensors["blocks.1.ffn.key.weight"])
    assert torch.equal(model.blocks[2].att.w0, tensors["blocks.2.att.w0"].double())
    assert isinstance(model.blocks[2].att.w0, nn.Parameter)
    assert model.blocks[2].att.w1.dtype == torch.bfloat16
    assert "blocks.1.ffn.key.weight" not in model.state_dict()


PEAK = """
import sys, threading, time, torch
from rwkv_accel.model.io import load_model
from rwkv_accel.model.precision import Precision

def private_bytes():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) * 1024

peak, stop = private_bytes(), False
start = peak
def watch():
    global peak
    while not stop:
        peak = max(peak, private_bytes())
        time.sleep(0.0005)
thread = threading.Thread(target=watch)
thread.start()
model = load_model(sys.argv[1], Precision.from_name(sys.argv[2]))
stop = True
thread.join()
print(max(peak, private_bytes()) - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads private memory from /proc")
def test_peak_memory_is_the_model_plus_one_tensor(tmp_path):
    """A file in another dtype is cast tensor by tensor; one in the same dtype takes no private memory."""
    config = RWKV7Config.for_new_model(n_layer=12, n_embd=512, vocab_size=4096)
    shapes = parameter_shapes(config)
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    numel = sum(tensor.numel() for tensor in tensors.values())
    largest = max(tensor.numel() for tensor in tensors.values())
    path = save_checkpoint(tensors, tmp_path / "model.pth")
    del tensors

    def peak(precision):
        command = [sys.executable, "-c", PEAK, str(path), precision]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(result.stdout)

    slack = 12 << 20
    assert peak("bf16-true") < slack
    assert 4 * numel <= peak("32-true") < 4 * (numel + largest) + slack


class TestRefusals:
    """One line that names the file, says what is wrong and what to do."""

    def refused(self, path, *words):
        with pytest.raises(UserError) as caught:
            load_model(path, FP32)
        message = str(caught.value)
        assert "\n" not in message
        assert Path(path).name in message
        for word in words:
            assert word in message

    def test_path(self, tmp_path, tensors):
        save_checkpoint(tensors, tmp_path / "model.pth")
        self.refused(tmp_path / "model", "does not exist", "did you mean model.pth?")
        self.refused(tmp_path / "other.pth", "does not exist", "check the path")
        self.refused(tmp_path, "is a folder")

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_a_disk_that_takes_no_more_is_an_oserror(self, tmp_path, tensors, suffix):
        path = save_checkpoint(tensors, tmp_path / f"model{suffix}")
        before = path.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                save_checkpoint(tensors, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == [path.name]

    @pytest.mark.parametrize("suffix", SUFFIXES)
    @pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
    def test_truncated(self, tmp_path, tensors, suffix, kept):
        path = save_checkpoint(tensors, tmp_path / f"model{suffix}")
        os.truncate(path, int(path.stat().st_size * kept))
        self.refused(path, "bytes) is truncated or damaged", "download it again")

    def test_not_a_checkpoint(self, tmp_path):
        pointer = tmp_path / "pointer.pth"
        pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        self.refused(pointer, "Git LFS pointer", "git lfs pull")
        page = tmp_path / "page.pth"
        page.write_text("<!DOCTYPE html><html></html>")
        self.refused(page, "is a web page")
        text = tmp_path / "chats.jsonl"
        text.write_text('{"text": "no weights"}\n')
        self.refused(text, "is no checkpoint (it begins with b'{\"te')", "give a .pth or .safetensors file")
        torch.save([1, 2], tmp_path / "list.pth")
        self.refused(tmp_path / "list.pth", "holds a list, not a dict of tensors")
        torch.save({"lr": 3.0}, tmp_path / "number.pth")
        self.refused(tmp_path / "number.pth", "entry `lr` is a float")
        torch.save({}, tmp_path / "empty.pth")
        self.refused(tmp_path / "empty.pth", "holds no tensors")

    def test_code_is_not_run(self, tmp_path):
        torch.save({"path": Path("x")}, tmp_path / "object.pth")
        self.refused(tmp_path / "object.pth", "Python objects other than tensors", "state_dict")

    def test_old_pickle_format_and_its_remedy(self, tmp_path, tensors):
        path = tmp_path / "old.pth"
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
        self.refused(path, "cannot be memory-mapped", "rewrite it once: python -c")
        with pytest.raises(UserError) as caught:
            read_checkpoint(path)
        command = str(caught.value).partition('python -c "')[2].rpartition('"')[0]
        subprocess.run([sys.executable, "-c", command], check=True)
        rewritten = read_checkpoint(tmp_path / "old.pth.new.pth")
        assert all(torch.equal(rewritten[name], tensors[name]) for name in tensors)

    @pytest.mark.parametrize(
        ("names", "words"),
        [
            (("blocks.0.att.time_decay", "blocks.0.att.time_maa_x", "blocks.0.att.ln_x.weight"), "RWKV-6"),
            (("blocks.0.att.time_decay", "blocks.0.att.time_mix_k", "blocks.0.att.ln_x.weight"), "RWKV-5"),
            (("blocks.0.att.time_decay", "blocks.0.att.time_first"), "RWKV-4"),
            (("model.layers.0.attn.r_proj.weight",), "Hugging Face"),
            (("blocks.0.att.time_state", "blocks.1.att.time_state"), "state-tuning file"),
            (("blocks.0.att.key.lora_A", "blocks.0.att.key.lora_B"), "adapter without its base"),
            (("some.weight",), "not a complete RWKV-7"),
        ],
    )
    def test_other_architectures(self, tmp_path, names, words):
        path = tmp_path / "foreign.pth"
        base = {"emb.weight": torch.zeros(9, 4)} if "blocks.0.att.time_decay" in names else {}
        torch.save(base | {name: torch.zeros(4, 4) for name in names}, path)
        self.refused(path, words)

    def test_deep_embed(self, tmp_path, tensors):
        path = save_checkpoint(tensors | {"blocks.0.ffn.s_emb.weight": torch.zeros(4, 4)}, tmp_path / "deep.pth")
        self.refused(path, "x070a/x070b")

    def test_missing_surplus_and_misshapen_tensors(self, tmp_path, tensors):
        for i in range(3):
            del tensors[f"blocks.{i}.att.k_a"]
            del tensors[f"blocks.{i}.ln2.bias"]
        tensors["extra.one"] = tensors["extra.two"] = torch.zeros(3)
        tensors["blocks.2.ffn.x_k"] = torch.zeros(64)
        path = save_checkpoint({n: t.clone() for n, t in tensors.items()}, tmp_path / "model.safetensors")
        self.refused(
            path,
            "6 missing (blocks.0.ln2.bias, blocks.0.att.k_a, blocks.1.ln2.bias, ...)",
            "2 unknown (extra.one, extra.two)",
            "1 of a wrong shape (blocks.2.ffn.x_k [64] instead of [1, 1, 64])",
            "download the file again",
        )

    def test_unmerged_adapter(self, tmp_path, tensors):
        path = save_checkpoint(tensors | {"blocks.0.att.key.lora_A": torch.zeros(2, 64)}, tmp_path / "m.pth")
        self.refused(path, "1 unknown (blocks.0.att.key.lora_A)", "merge them into the base first")

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_quantised_weights(self, tmp_path, tensors, suffix):
        tensors["head.weight"] = torch.zeros(37, 64, dtype=torch.uint8)
        path = save_checkpoint(tensors, tmp_path / f"model{suffix}")
        self.refused(path, "`head.weight` has dtype", "unquantised checkpoint")


class TestSave:
    def test_failure_leaves_the_old_file_and_nothing_else(self, tmp_path, tensors, monkeypatch):
        path = save_checkpoint(tensors, tmp_path / "model.pth")
        before = path.read_bytes()

        def fail(*_args):
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint({"a": torch.ones(3)}, path)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_views_do_not_drag_their_storage_along(self, tmp_path, suffix):
        whole = torch.arange(250_000.0).view(500, 500)
        path = save_checkpoint({"a": whole[:2], "b": whole.T}, tmp_path / f"views{suffix}")
        assert path.stat().st_size < 1_010_000
        back = read_checkpoint(path)
        assert torch.equal(back["a"], whole[:2])
        assert torch.equal(back["b"], whole.T)

    def test_refusals(self, tmp_path):
        with pytest.raises(UserError, match=r"model\.bin: use the suffix \.pth or \.safetensors"):
            save_checkpoint({"a": torch.ones(1)}, tmp_path / "model.bin")
        with pytest.raises(ValueError, match="`a` has no data to save; gather sharded parameters first"):
            save_checkpoint({"a": torch.ones(0)}, tmp_path / "model.pth")
        assert list(tmp_path.iterdir()) == []


class TestDigest:
    def test_does_not_depend_on_the_container(self, tmp_path, tensors):
        names = ["one.pth", "two.safetensors", "reversed.pth", "prefixed.pth"]
        backwards = dict(reversed(tensors.items()))
        save_checkpoint(tensors, tmp_path / names[0])
        save_checkpoint(tensors, tmp_path / names[1])
        save_checkpoint(backwards, tmp_path / names[2])
        save_checkpoint({f"_forward_module.{n}": t for n, t in tensors.items()}, tmp_path / names[3])
        digests = {checkpoint_digest(tmp_path / name) for name in names}
        assert len(digests) == 1
        digest = digests.pop()
        assert digest.startswith("sha256:")
        assert len(digest) == 7 + 64

    def test_is_stable_over_versions(self, tmp_path):
        tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)}
        path = save_checkpoint(tensors, tmp_path / "small.pth")
        assert checkpoint_digest(path) == DIGEST_OF_SMALL

    def test_sees_every_change(self, tmp_path, tensors):
        def digest(changed):
            return checkpoint_digest(save_checkpoint(changed, tmp_path / "changed.pth"))

        flipped = {**tensors, "blocks.1.att.k_a": tensors["blocks.1.att.k_a"].clone()}
        flipped["blocks.1.att.k_a"][0, 0, 63] += 1e-7
        swapped = {**tensors, "blocks.0.att.k_a": tensors["blocks.1.att.k_a"]}
        swapped["blocks.1.att.k_a"] = tensors["blocks.0.att.k_a"]
        square = tensors["blocks.0.att.key.weight"]
        versions = [
            tensors,
            flipped,
            swapped,
            {**tensors, "blocks.0.att.key.weight": square.reshape(32, 128)},
            {**tensors, "blocks.0.att.key.weight": square.T},
            {**tensors, "head.weight": tensors["head.weight"].bfloat16()},
            {name: t for name, t in tensors.items() if name != "ln_out.bias"},
        ]
        assert len({digest(version) for version in versions}) == len(versions)


DIGEST_OF_SMALL = "sha256:bdd68f703239dae889410f170ba443c88240269e5e885b47a3cabb5fe9458ba6"
