"""Uploading a run to the Hugging Face hub: what the card says is true, and what is uploaded works after a download."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from sb3_pgplus import A2CPlus, PPOPlus
from sb3_pgplus.cli import app
from sb3_pgplus.configs import read_mapping
from sb3_pgplus.model_file import pickled_attributes
from sb3_pgplus.playing import EVALUATION_SEED, evaluate, load_run

TRAIN = (
    *("train", "--n-timesteps", "64", "--n-envs", "1", "--no-progress", "--eval-episodes", "3"),
    *("--set", "n_steps=64", "--set", "batch_size=64", "--set", "n_epochs=1"),
)
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "plain": ("--env", "CartPole-v1", "--set", "clip_range=0.3"),
    "with arguments": ("--env", "CartPole-v1", "--set", "env_kwargs.sutton_barto_reward=true"),
    "wrapped and stacked": (
        *("--env", "CartPole-v1", "--set", "frame_stack=2"),
        *("--set", "env_wrapper={gymnasium.wrappers.TimeAwareObservation: {flatten: true}}"),
    ),
}


def command(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of an environment → a run folder, with what a dry run writes in ``hub``."""

    @cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("runs") / "run"
        done = command(*TRAIN, *ENVIRONMENTS[name], "--out", folder)
        assert done.exit_code == 0, done.output
        (folder / "video.mp4").write_bytes(b"stands for a video")
        done = command("push", folder, "--repo", "me/agent", "--dry-run")
        assert done.exit_code == 0, done.output
        assert "Nothing is uploaded" in done.stdout
        return folder

    return make


@pytest.fixture(params=ENVIRONMENTS)
def run(request: pytest.FixtureRequest, runs: Callable[[str], Path]) -> Path:
    return runs(request.param)


@pytest.fixture
def package(run: Path) -> Path:
    return run / "hub"


def test_a_dry_run_writes_what_would_be_uploaded(run: Path, package: Path) -> None:
    assert {file.name for file in package.iterdir()} == {
        *("README.md", "config.yml", "evaluation.yml", "learning_curve.png", "model.zip", "replay.mp4")
    }
    for name in ("config.yml", "model.zip", "learning_curve.png"):
        assert (package / name).read_bytes() == (run / name).read_bytes()
    assert read_mapping(package / "evaluation.yml") == yaml.safe_load((run / "evaluation.yml").read_text())


def test_the_card_s_metadata_read_back_by_the_hub_s_own_parser_say_what_was_measured(run: Path, package: Path) -> None:
    data = ModelCard.load(package / "README.md").data
    config = read_mapping(run / "config.yml")
    evaluation = read_mapping(run / "evaluation.yml")
    assert data.library_name == "stable-baselines3"
    assert data.pipeline_tag == "reinforcement-learning"
    assert {config["env"], "reinforcement-learning", "stable-baselines3", "sb3_pgplus"} <= set(data.tags)
    assert data.model_name == "PPOPlus"
    assert data.eval_results is not None
    [result] = data.eval_results
    assert (result.task_type, result.dataset_type) == ("reinforcement-learning", config["env"])
    assert (result.metric_type, result.verified) == ("mean_reward", False)
    mean, std = map(float, result.metric_value.split(" +/- "))
    assert mean == pytest.approx(evaluation["mean_return"], abs=0.006)
    assert std == pytest.approx(evaluation["std_return"], abs=0.006)


def test_the_card_lists_the_settings_that_were_changed(run: Path, package: Path) -> None:
    config = read_mapping(run / "config.yml")
    rows = re.findall(r"^\| `(\w+)` \| `(.*)` \| `(.*)` \|$", (package / "README.md").read_text(), re.MULTILINE)
    defaults = PPOPlus.hparams_class.defaults()
    changed = {name for name, value in defaults.items() if config[name] != value and name != "n_envs"}
    assert {name for name, _, _ in rows} == changed
    assert all(value == str(config[name]) and default == str(defaults[name]) for name, value, default in rows)
    assert "n_steps" in changed


def test_the_card_s_example_runs_on_what_is_uploaded(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The download alone is replaced, by a look into the folder."""

    def local(repo_id: str, filename: str) -> str:
        assert repo_id == "me/agent"
        return str(package / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", local)
    [example] = re.findall(r"```python\n(.*?)```", (package / "README.md").read_text(), re.DOTALL)
    assert "trusted=False" in example
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    trained_in = load_run(package)
    assert names["env"].observation_space == trained_in.model.observation_space
    assert len(names["reward"]) == 1


def test_what_is_uploaded_is_a_run_folder(run: Path, package: Path) -> None:
    """Evaluated anew from the download, it gives the returns that the card's numbers come from."""
    there = load_run(package)
    again = evaluate(there.model, there.environment, n_episodes=3, seed=EVALUATION_SEED)
    assert again.returns == read_mapping(run / "evaluation.yml")["returns"]


def test_a_run_without_an_evaluation_is_evaluated_and_left_as_it_is(tmp_path: Path) -> None:
    assert command(*TRAIN, "--env", "CartPole-v1", "--eval-episodes", "0", "--out", tmp_path / "run").exit_code == 0
    assert command("push", tmp_path / "run", "--repo", "me/a", "--dry-run", "--out", tmp_path / "up").exit_code == 0
    assert read_mapping(tmp_path / "up" / "evaluation.yml")["n_episodes"] == 10
    assert not (tmp_path / "run" / "evaluation.yml").exists()
    assert not (tmp_path / "up" / "replay.mp4").exists()


def rate(progress: float) -> float:
    return 1e-3 * progress


def test_a_model_with_code_inside_says_so_on_the_card_and_on_the_console(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert command(*TRAIN[:8], "--algo", "a2cplus", "--env", "CartPole-v1", "--out", run).exit_code == 0
    A2CPlus.load(run / "model.zip", learning_rate=rate).save(run / "model.zip")
    assert pickled_attributes(run / "model.zip")
    done = command("push", run, "--repo", "me/agent", "--dry-run")
    assert done.exit_code == 0
    assert "asks for trust" in done.stderr and "learning_rate" in done.stderr
    card = (run / "hub" / "README.md").read_text()
    assert "A2CPlus.load(" in card and "trusted=True" in card
    assert "because it holds pickles: learning_rate" in card
    refused = command("evaluate", run, "--untrusted")
    assert refused.exit_code == 2 and "learning_rate" in refused.stderr
    assert command("evaluate", run, "--n-episodes", 1).exit_code == 0


def test_without_trust_a_configuration_imports_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert command(*TRAIN, "--env", "CartPole-v1", "--out", run).exit_code == 0
    assert command("evaluate", run, "--untrusted", "--n-episodes", 1).exit_code == 0
    config = read_mapping(run / "config.yml")
    for change in ({"env_wrapper": "subprocess.Popen"}, {"env": "evil_module:CartPole-v1"}):
        (run / "config.yml").write_text(yaml.safe_dump({**config, **change}))
        refused = command("evaluate", run, "--untrusted", "--n-episodes", 1)
        assert refused.exit_code == 2 and next(iter(change.values())) in refused.stderr
        assert command("evaluate", run, "--untrusted", "--env", "CartPole-v1", "--n-episodes", 1).exit_code == 0


@pytest.mark.parametrize(
    ("repo", "message"), [("agent", "expected user/name"), ("me/a b", "--repo me/a b"), ("a/b/c", "--repo a/b/c")]
)
def test_a_name_that_no_repository_can_have_is_refused(repo: str, message: str, tmp_path: Path) -> None:
    refused = command("push", tmp_path, "--repo", repo, "--dry-run")
    assert refused.exit_code == 2 and message in refused.stderr


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    refused = command("push", tmp_path, "--repo", "me/agent", "--dry-run")
    assert refused.exit_code == 2 and "holds no model.zip" in refused.stderr
    assert not (tmp_path / "hub").exists()


# --- the upload, with the hub's real client and a server that answers as the hub does ---------------------------------


class Hub(BaseHTTPRequestHandler):
    """The four requests of an upload; files travel inside the commit, as small ones do on the hub."""

    requests: list[tuple[str, Any]]
    status = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.requests.append((self.path, body))
        address = f"http://{self.headers['Host']}/me/agent"
        answers: dict[str, Any] = {
            "/api/repos/create": {"url": address, "id": "me/agent"},
            "/api/validate-yaml": {"errors": [], "warnings": []},
            "/api/models/me/agent/commit/main": {
                "success": True,
                "commitOid": "0" * 40,
                "commitUrl": f"{address}/commit/{0:040}",
            },
        }
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            answers[self.path] = {"files": files}
        content = json.dumps(answers.get(self.path, {})).encode()
        self.send_response(self.status if self.path in answers else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    handler = type("ThisHub", (Hub,), {"requests": []})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()
        thread.join()


def push_to(address: str, run: Path, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": "hf_test", "HF_HOME": str(home)}
    program = [sys.executable, "-m", "sb3_pgplus.cli", "push", str(run), "--repo", "me/agent", *arguments]
    return subprocess.run(program, env=environment, capture_output=True, text=True, check=False)


def test_everything_is_uploaded_in_one_commit(
    runs: Callable[[str], Path], hub: tuple[str, type[Hub]], tmp_path: Path
) -> None:
    run = runs("plain")
    address, handler = hub
    done = push_to(address, run, tmp_path, "--private", "--message", "My agent")
    assert done.returncode == 0, done.stderr
    assert f"Uploaded: {address}/me/agent" in done.stdout
    requests = dict(handler.requests)
    created = json.loads(requests["/api/repos/create"])
    assert created["name"] == "agent" and created["organization"] == "me"
    assert created.get("private") is True or created.get("visibility") == "private"
    [commit] = [body for path, body in handler.requests if path.endswith("/commit/main")]
    header, *files = [json.loads(line) for line in commit.splitlines()]
    assert header["value"]["summary"] == "My agent"
    uploaded = {each["value"]["path"]: base64.b64decode(each["value"]["content"]) for each in files}
    assert uploaded == {file.name: file.read_bytes() for file in (run / "hub").iterdir()}


def test_a_hub_that_refuses_is_one_clear_line(
    runs: Callable[[str], Path], hub: tuple[str, type[Hub]], tmp_path: Path
) -> None:
    run = runs("plain")
    address, handler = hub
    handler.status = 401
    done = push_to(address, run, tmp_path)
    assert done.returncode == 1
    assert "401" in done.stderr and "Traceback" not in done.stderr
