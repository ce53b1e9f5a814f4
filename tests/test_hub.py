"""A repository on the hub is opened before training; nothing here reaches the hub."""

import pytest

from milo_latent.programs import run_program
from milo_latent.training import hub, train_restorer


class Hub:
    """Records what is asked of it."""

    def __init__(self, refusal=None):
        self.asked, self.refusal = [], refusal

    def create_repo(self, name, *, exist_ok):
        self.asked.append(("create", name, exist_ok))

    def preupload_lfs_files(self, name, additions):
        self.asked.append(("may write", name, [each.path_in_repo for each in additions]))
        if self.refusal:
            raise self.refusal

    def upload_folder(self, *, repo_id, folder_path):
        self.asked.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))


@pytest.fixture
def train(model_folder, images, tmp_path, monkeypatch, capsys):
    def run(api, token="token"):
        monkeypatch.setattr(hub, "HfApi", lambda: api)
        monkeypatch.setattr(hub, "get_token", lambda: token)
        command = ["--model", model_folder, "--images", images, "--output", tmp_path / "run", "--steps", 1]
        command += ["--batch-size", 1, "--crop-size", 128, "--precision", "no", "--push-to-hub", "me/tuned"]
        code = run_program(lambda: train_restorer.main([str(each) for each in command]))
        return code, capsys.readouterr().err

    return run


def test_a_pipeline_is_uploaded_to_the_repository_that_was_opened_first(train):
    api = Hub()
    code, error = train(api)
    assert code == 0, error
    assert [each[0] for each in api.asked] == ["create", "may write", "upload"]
    assert {"README.md", "model_index.json", "controlnet"} <= set(api.asked[2][2])


@pytest.mark.parametrize(
    ("api", "token", "reason"),
    [
        (Hub(), None, "there is no token"),
        (Hub(RuntimeError("403 Forbidden.\nRequest ID: 7")), "token", "403 Forbidden"),
        (Hub(ConnectionError()), "token", "ConnectionError"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_in_one_line_before_training(api, token, reason, train, monkeypatch):
    monkeypatch.setattr(train_restorer, "make_loss", pytest.fail)
    code, error = train(api, token)
    assert code == 1
    [line] = error.strip().splitlines()
    assert "got 'me/tuned'" in line
    assert reason in line
    assert "leave out --push-to-hub" in line
