"""What the recipe says about storage reaches it."""

from rwkv_accel.checkpoint import remote
from rwkv_accel.config.schema import CheckpointConfig


def test_storage_gets_the_options_of_the_recipe(monkeypatch):
    seen = []

    class Store:
        def __init__(self, url, options, *, verify):
            seen.append((url, options, verify))

        def check(self):
            pass

    monkeypatch.setattr(remote, "RemoteStore", Store)
    monkeypatch.setattr(remote, "list_checkpoints", lambda store: ([], []))
    remote.open_remote(CheckpointConfig(remote_url="memory://x", remote_options={"a": 1}, remote_verify=False))
    assert seen == [("memory://x", {"a": 1}, False)]
