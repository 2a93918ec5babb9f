"""python -m rwkv_accel.generate: finds runs, adapters and checkpoints, says what is wrong, stops cleanly."""

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rwkv_accel.config.load import dump_config
from rwkv_accel.config.schema import ModelConfig, PeftConfig, RunConfig
from rwkv_accel.data.prompt import prompt_writer
from rwkv_accel.data.tokenizer import build_tokenizer
from rwkv_accel.generate import main
from rwkv_accel.generation import footprint
from rwkv_accel.generation.engine import TextGenerator
from rwkv_accel.generation.params import STOP_SETS
from rwkv_accel.model.io import checkpoint_digest, save_checkpoint
from rwkv_accel.peft.adapter_file import AdapterMeta, peft_section, save_adapter
from rwkv_accel.peft.apply import adapter_parameters, load_model_and_apply_peft

JINJA = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUICK = ["--max-new-tokens", "12", "--greedy"]


def run_config(out_dir, base, **peft) -> RunConfig:
    return RunConfig(
        out_dir=str(out_dir),
        model=ModelConfig(path=str(base)),
        peft=PeftConfig(rank=4, **peft),
        data={"path": "x.jsonl", "tokenizer": "byte"},
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory, make_model):
    """base.pth, other.pth, a LoRA run, a full fine-tuning run, and the models that their weights make."""
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 0), ("other", 1), ("tuned", 2)):
        model = make_model(257, seed=seed, dtype=torch.float32)
        save_checkpoint(model.state_dict(), root / f"{name}.pth")
    config = run_config(root / "run", root / "base.pth")
    lora = load_model_and_apply_peft(config.model, config.peft)
    for name, param in adapter_parameters(lora).items():
        param.data.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    folder = root / "run" / "adapter" / "epoch-0001"
    meta = AdapterMeta(
        peft=peft_section(config.peft), base_digest=checkpoint_digest(root / "base.pth"), tokenizer="byte"
    )
    save_adapter(folder, {name: p.data for name, p in adapter_parameters(lora).items()}, meta)
    full = root / "full" / "adapter" / "step-00000007"
    full.mkdir(parents=True)
    (root / "tuned.pth").rename(full / "model.pth")
    for run in ("run", "full"):
        saved = folder if run == "run" else full
        (saved.parent / "LATEST").write_text(saved.name + "\n")
        (root / run / "run.yaml").write_text(dump_config(run_config(root / run, root / "base.pth")))
    return root, lora


def call(capsys, *argv) -> tuple[int, str, str]:
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def greedy(model, prompt) -> str:
    done = TextGenerator(model, build_tokenizer("byte")).generate([prompt], max_new_tokens=12, temperature=None)
    return done[0].text


def test_every_way_to_name_an_adapter_gives_the_adapted_model(files, capsys):
    root, lora = files
    want = greedy(lora, "Hi") + "\n"
    epoch = root / "run" / "adapter" / "epoch-0001"
    for path in ([root / "run"], [epoch], [root / "base.pth", "--adapter", epoch]):  # prompts may follow options
        assert call(capsys, *path, "Hi", "--raw", *QUICK) == (0, want, "")
    assert call(capsys, root / "base.pth", "Hi", "--raw", *QUICK)[1] != want


def test_full_fine_tuning_and_plain_checkpoints(files, capsys, make_model):
    root, _ = files
    for seed, path in ((2, root / "full"), (2, root / "full" / "adapter" / "step-00000007"), (0, root / "base.pth")):
        want = greedy(make_model(257, seed=seed, dtype=torch.float32), "Hi") + "\n"
        assert call(capsys, path, "Hi", "--raw", *QUICK) == (0, want, "")


def test_a_question_goes_into_the_template_and_several_are_numbered(files, capsys, make_model):
    root, _ = files
    model = make_model(257, dtype=torch.float32)
    code, out, _ = call(capsys, root / "base.pth", "Hi", "User: Ho", *QUICK)
    replies = [greedy(model, f"User: {q}\n\nAssistant:").strip() for q in ("Hi", "Ho")]
    assert (code, out) == (0, f"[1] Hi\n{replies[0]}\n\n[2] User: Ho\n{replies[1]}\n\n")


def test_prompts_in_each_template(tmp_path):
    chat, raw = prompt_writer("rwkv"), prompt_writer("raw")
    assert chat("a\n\nb") == "User: a\nb\n\nAssistant:"
    assert raw("a\n\nb") == "a\n\nb"
    assert chat("System: s\n\nUser: a") == "System: s\n\nUser: a\n\nAssistant:"
    thinking = "User: a\n\nAssistant: <think"
    assert chat(thinking) == thinking
    (tmp_path / "t.jinja").write_text(JINJA)
    assert prompt_writer(str(tmp_path / "t.jinja"))("User: a") == "<user>User: a</user><assistant>"


def test_a_model_is_asked_in_the_template_that_it_was_trained_with(files, capsys, tmp_path):
    root, lora = files
    for template, want in (("raw", "Hi"), (str(tmp_path / "t.jinja"), "<user>Hi</user><assistant>")):
        (tmp_path / "t.jinja").write_text(JINJA)
        run = tmp_path / Path(template).stem
        shutil.copytree(root / "run", run)
        config = run_config(run, root / "base.pth")
        data = config.data.model_copy(update={"template": template})
        (run / "run.yaml").write_text(dump_config(config.model_copy(update={"data": data})))
        assert call(capsys, run, "Hi", *QUICK) == (0, greedy(lora, want) + "\n", "")
        assert call(capsys, run, "Hi", "--raw", *QUICK) == (0, greedy(lora, "Hi") + "\n", "")
        chat = greedy(lora, "User: Hi\n\nAssistant:") + "\n"
        assert call(capsys, run, "Hi", "--template", "rwkv", *QUICK) == (0, chat, "")
        code, _, err = call(capsys, run, "--chat")
        assert code == 2
        assert "a conversation is written in the template rwkv, this model was trained with" in err


def test_beams_print_scores(files, capsys):
    root, _ = files
    argv = (root / "base.pth", "Hi", "--raw", "--num-beams", 3, "--num-best", 2, "--max-new-tokens", 5, "--ban-id", 0)
    code, out, _ = call(capsys, *argv)
    scores = [float(line.split(" ")[0]) for line in out.split("\n") if line.startswith("-")]
    assert code == 0
    assert len(scores) == 2
    assert scores == sorted(scores, reverse=True)


def test_job_from_the_command_line(files, capsys, tmp_path):
    root, lora = files
    (tmp_path / "in.jsonl").write_text('{"prompt": "Hi", "raw": true}\n{"prompt": "Hi"}\n')
    target = tmp_path / "out.jsonl"
    code, out, _ = call(capsys, root / "run", "--input", tmp_path / "in.jsonl", "--output", target, *QUICK)
    assert (code, out) == (0, f"2 replies in {target}\n")
    texts = [json.loads(line)["text"] for line in target.read_text().splitlines()]
    assert texts == [greedy(lora, "Hi"), greedy(lora, "User: Hi\n\nAssistant:")]


def test_memory_continues_a_conversation(files, capsys, tmp_path):
    root, lora = files
    memory = tmp_path / "talk"
    ascii_only = [arg for token in range(129, 257) for arg in ("--ban-id", str(token))]
    _, first, _ = call(capsys, root / "run", "Hi", *QUICK, *ascii_only, "--save-memory", memory)
    _, second, _ = call(capsys, root / "run", "More", *QUICK, "--memory", memory)
    said = first.removesuffix("\n")
    assert second == greedy(lora, f"User: Hi\n\nAssistant:{said}\n\nUser: More\n\nAssistant:") + "\n"
    code, _, err = call(capsys, root / "base.pth", "More", *QUICK, "--memory", memory)
    assert code == 2
    assert "belongs to other weights" in err


def test_time_state_is_the_start_of_every_reply(files, capsys, tmp_path, make_model):
    root, _ = files
    model = make_model(257, dtype=torch.float32)
    states = {f"blocks.{i}.att.time_state": torch.randn(2, 16, 16) for i in range(2)}
    torch.save(states, tmp_path / "state.pth")
    for i, block in enumerate(model.blocks):
        block.att.time_state = torch.nn.Parameter(states[f"blocks.{i}.att.time_state"])
    argv = (root / "base.pth", "Hi", "--raw", *QUICK, "--time-state", tmp_path / "state.pth")
    assert call(capsys, *argv)[1] == greedy(model, "Hi") + "\n"
    torch.save({"blocks.0.att.time_state": torch.randn(2, 16, 16)}, tmp_path / "short.pth")
    code, _, err = call(capsys, *argv[:-1], tmp_path / "short.pth")
    assert code == 2
    assert "no state for this model (fewer layers)" in err


def test_chat_from_the_command_line(files, capsys, monkeypatch):
    root, lora = files
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n/exit\n"))
    code, out, _ = call(capsys, root / "run", "--chat", *QUICK)
    assert code == 0
    assert f"\nAssistant:{greedy(lora, 'User: Hi' + STOP_SETS['chat'][0][:2] + 'Assistant:')}\nUser: " in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["base.pth"], "give one of: prompts, --chat, or --input"),
        (["base.pth", "a", "--chat"], "give one of: prompts, --chat, or --input"),
        (["base.pth", " "], "the prompt is empty"),
        (["base.pth", "a", "--temperature", "-0.5"], "temperature -0.5 is out of range"),
        (["base.pth", "a", "--temperature", "0"], "temperature 0.0 is out of range; it must be above 0 (for the"),
        (["base.pth", "", "--raw"], "the prompt is empty"),
        (["base.pth", "a", "--top-p", "0"], "top_p 0.0 is out of range"),
        (["base.pth", "a", "--top-p", "1.5"], "top_p 1.5 is out of range"),
        (["base.pth", "a", "--stop", "chatt"], "unknown stop 'chatt'; use one of none, chat, paragraph, line"),
        (["base.pth", "a", "--ban-id", "257"], "ban_ids holds token id 257"),
        (["base.pth", "a", "--batch-size", "0"], "batch_size 0 is out of range"),
        (["base.pth", "a", "--num-beams", "2", "--num-best", "3"], "num_best 3 is out of range"),
        (["base.pth", "a", "--tokenizer", "world"], "tokenizer world has 65536 ids"),
        (["base.pth", "--input", "x"], "--input and --output go together"),
        (["base.pth", "a", "b", "--save-memory", "m"], "--save-memory keeps one conversation"),
        (["base.pth", "a", "--memory", "none"], "memory none does not exist"),
        (["base.pth", "a", "--device", "abacus"], "device abacus cannot be used here"),
        (["base.pth", "a", "--template", "no.jinja"], "No such file or directory: 'no.jinja'; name it with --template"),
        (["nothing", "a"], "nothing does not exist"),
        (["nothing.pth", "a"], "nothing.pth does not exist; give a run folder"),
        ([".", "a"], ". is no run (no run.yaml) and no save"),
        (["other.pth", "a", "--adapter", "run/adapter/epoch-0001"], "was trained on another base than other.pth"),
        (["run", "a", "--base", "other.pth"], "was trained on another base than other.pth"),
        (["run", "a", "--adapter", "run/adapter/epoch-0001"], "already has the adapter"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(files, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(files[0])
    code, out, err = call(capsys, *argv)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("beams", [[], ["--num-beams", "3"]])
def test_a_prompt_that_does_not_fit_into_memory_is_foreseen(files, capsys, monkeypatch, beams):
    prompt, argv = "word " * 4000, [files[0] / "base.pth", "--raw", "--max-new-tokens", "1", *beams]
    monkeypatch.setattr("rwkv_accel.generation.footprint.free_bytes", lambda device: 9 << 20)
    assert call(capsys, *argv, "word")[0] == 0
    code, out, err = call(capsys, *argv, prompt)
    assert (code, out) == (2, "")
    assert "prompts of about 20,000 tokens need" in err
    assert "0.01 GiB are free; shorten the prompt" in err
    assert err.count("\n") == 1


def test_free_memory_respects_a_containers_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(footprint, "CGROUP", tmp_path)
    whole = footprint.free_bytes(torch.device("cpu"))
    assert whole > 1 << 20
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert footprint.free_bytes(torch.device("cpu")) > 1 << 20
    (tmp_path / "memory.max").write_text("5000\n")
    assert footprint.free_bytes(torch.device("cpu")) == 4000


def test_best_of_a_run_finds_its_recipe_and_start_weights(files, capsys, tmp_path):
    """best/ lies one level below the run, and a run that made its own weights keeps them in its folder."""
    root, _ = files
    best = tmp_path / "moved" / "best"
    shutil.copytree(root / "run" / "adapter" / "epoch-0001", best)
    meta = json.loads((best / "adapter.json").read_text())
    (best / "adapter.json").write_text(json.dumps({**meta, "base_path": "/gone/base.pth", "tokenizer": None}))
    recipe = run_config(tmp_path / "moved", root / "base.pth").model_dump(mode="json")
    recipe["model"] = {"init": {"n_layer": 2, "n_embd": 32, "head_size": 16}}
    (tmp_path / "moved" / "run.yaml").write_text(json.dumps(recipe))
    shutil.copy(root / "base.pth", tmp_path / "moved" / "rwkv-init.pth")
    want = call(capsys, root / "run", "Hi", "--raw", *QUICK)
    assert want[0] == 0
    assert call(capsys, best, "Hi", "--raw", *QUICK) == want


def test_an_adapter_without_its_base_says_so(files, capsys, tmp_path):
    epoch = files[0] / "run" / "adapter" / "epoch-0001"
    alone = tmp_path / "a" / "b" / "alone"
    alone.mkdir(parents=True)
    for file in epoch.iterdir():
        (alone / file.name).write_bytes(file.read_bytes())
    code, _, err = call(capsys, alone, "a")
    assert (code, "does not say where its base model is; give it with --base" in err) == (2, True)
    assert call(capsys, alone, "Hi", "--raw", *QUICK, "--base", files[0] / "base.pth")[0] == 0


def test_help_loads_no_torch():
    code = "import sys, rwkv_accel.generate as g; g.build_parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_ends_a_job_and_its_next_start_completes_it(files, tmp_path, number):
    source, target, part = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "out.jsonl.tmp"
    lines = [{"prompt": "quick", "max_new_tokens": 1}, {"prompt": "slow", "max_new_tokens": 10**6, "stop_ids": []}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = [sys.executable, "-m", "rwkv_accel.generate", str(files[0] / "run")]
    job = subprocess.Popen([*argv, "--input", str(source), "--output", str(target)], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (part.is_file() and part.read_text().count("\n") == 2):  # what the job is, and the first reply
        assert time.monotonic() < deadline
        assert job.poll() is None
        time.sleep(0.1)
    job.send_signal(number)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 128 + number
    assert out.startswith("1 replies in ")
    assert "start the same command again to go on" in out
    assert not target.exists()
    assert [json.loads(line)[0] for line in part.read_text().splitlines()[1:]] == [0]
