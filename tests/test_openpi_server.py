"""examples/openpi_server.py: openpi's client, as published and with its own release of NumPy, gets what `policy.act` gives."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pi_stepnft import policies

ROOT = Path(__file__).resolve().parents[1]
POLICY = "pi0-tiny-pickcube-rgb"
CLIENT = """
import sys
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy

seen, out = np.load("seen.npz"), {}
client = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]))
assert client.get_server_metadata() == dict(policy="pi0-tiny-pickcube-rgb", type="pi0", horizon=4)
for i in range(3):
    obs = {"observation/image": seen["image"][i, 0], "observation/state": seen["state"][i], "prompt": str(seen["prompt"])}
    out[str(i)] = client.infer(obs)["actions"]
    for mistake, told in (
        ({**obs, "observation/state": obs["observation/state"][1:]}, "state has 28 dimensions; expected 29"),
        ({"prompt": "push", "observation/state": 0}, "has no observation/image, only prompt, observation/state"),
    ):
        try:
            client.infer(mistake)
        except RuntimeError as error:
            assert told in str(error), error
        else:
            raise AssertionError(told)
np.savez("actions.npz", **out)
"""


@pytest.mark.slow
def test_openpis_client_gets_the_policys_actions(tmp_path):
    pytest.importorskip("msgpack")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    packages = ["openpi-client==0.1.2", "typing_extensions"]  # the second it imports, but does not ask for
    subprocess.run([python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *packages], check=True)
    rng = np.random.default_rng(0)
    obs = dict(image=rng.integers(0, 256, (3, 1, 96, 96, 3), np.uint8), state=rng.normal(size=(3, 29)).astype(np.float32))
    np.savez(tmp_path / "seen.npz", prompt="pick up the red cube", **obs)

    command = [sys.executable, ROOT / "examples" / "openpi_server.py", POLICY, "--port", "0", "--seed", "7"]
    server = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        port = server.stdout.readline().rpartition(":")[2].strip()
        subprocess.run([python, "-c", CLIENT, port], cwd=tmp_path, check=True)
    finally:
        server.kill()
        server.wait()

    policy = policies.load(POLICY)
    torch.manual_seed(7)
    with np.load(tmp_path / "actions.npz") as received:
        for i in range(3):
            expected = policy.act({name: value[i : i + 1] for name, value in obs.items()}, ["pick up the red cube"])[0]
            assert received[str(i)].dtype == np.float32 and expected.std() > 0
            np.testing.assert_allclose(received[str(i)], expected, atol=1e-6)
