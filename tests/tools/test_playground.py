"""`psa-jax playground`: the whole command in a process of its own, and what it refuses before it reads weights."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.playground_server import ASKED, Served
from support.torch_adapters import random_adapter

import psa_jax
from psa_jax.interop.native import save_adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.profiles.encoders import get_encoder

ROOT = Path(psa_jax.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def flags(smallest_pipeline, tmp_path_factory):
    """Base model and an adapter of a kind without a gate."""
    model, encoder = smallest_pipeline[1], get_encoder("features")
    config = AdapterConfig.for_unet(model.unet.config, user_dim=encoder.dim, kind="prompt", tokens=1)
    about = {"base_model": model.base_hash, "encoder": encoder.name, "encoder_fingerprint": encoder.fingerprint}
    path = tmp_path_factory.mktemp("playground_command") / "a.safetensors"
    save_adapter(random_adapter(config), path, about)
    return [f"--model={model.folder}", f"--adapter={path}", "--steps=2", "--guidance=3", "--port=0"]


# What a shell has started in the background inherits a Ctrl-C that is ignored.
_LISTENING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_from_the_command_to_ctrl_c(flags):
    command = [sys.executable, "-c", _LISTENING, "-m", "psa_jax", "playground", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        url = json.loads(running.stdout.readline())["url"]
        there = Served(int(url.removesuffix("/").rpartition(":")[2]))
        assert url == f"{there.url}/"
        assert "<dt>Kind</dt><dd>prompt</dd>" in there.send("GET", "/").found
        assert (found := there.post(ASKED)).status == 200
        assert [set(user) for user in found.found["users"]] == [{"picture"}] * 2 and found.found["base"] is None
        assert there.post(ASKED | {"prompt": "cat " * 99}).found["notes"]
        assert there.post(ASKED | {"users": [{"religion": "Buddhism"}]}).status == 400
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130 and out == ""
    *_, compiled, opened, interrupted = err.splitlines()
    assert compiled.startswith("psa-jax: compiled, with the first 3 pictures, in ")
    assert opened == f"psa-jax: open {url} in a browser of this machine; Ctrl-C ends"
    assert interrupted == "psa-jax: interrupted"
    assert not [word for word in ("Buddhism", "natural disasters", "cat", "Traceback") if word in err]


def test_a_port_that_is_in_use(flags, refused):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        error = refused("playground", *flags[:-1], f"--port={port}")
    assert error.startswith(f"psa-jax: error: port {port} is in use; give another one by --port")
    assert logging.getLogger("psa_jax.diffusion.generate").level == logging.NOTSET  # a process may go on with others


def test_what_it_refuses(flags, refused, tmp_path):
    assert "--steps: give a whole number from 1 to 200" in refused("playground", *flags, "--steps=201")
    assert "--guidance: give a finite number" in refused("playground", *flags, "--guidance=51")
    assert "--port: '65536' does not fit" in refused("playground", *flags, "--port=65536")
    absent = tmp_path / "absent.safetensors"
    assert str(absent) in refused("playground", *flags, f"--adapter={absent}")


def test_without_the_extra_it_says_how_to_install_it(flags, refused, monkeypatch):
    import psa_jax.playground

    monkeypatch.delitem(sys.modules, "psa_jax.playground.server", raising=False)
    monkeypatch.delattr(psa_jax.playground, "server", raising=False)
    monkeypatch.setitem(sys.modules, "starlette", None)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    assert refused("playground", *flags).endswith("pip install 'psa_jax[playground]'\n")


def test_there_is_no_flag_for_another_address(capsys):
    from psa_jax import cli

    options = {option for action in cli._command_parser("playground")._actions for option in action.option_strings}
    assert not options & {"--host", "--bind", "--address", "--listen", "--public", "--share"}
