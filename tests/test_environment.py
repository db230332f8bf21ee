"""lab.about: what a notebook's first cell prints."""

import pytest
import torch

import lab
from lab.environment import SHOWN, about
from lab.errors import ModelError
from lab.model.zoo import load, weights_hash


def test_about_prints_versions_device_seed_and_hash(capsys):
    torch.manual_seed(7)
    found = lab.about()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*SHOWN, "device", "seed", "model"]
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert found["seed"] == 7 and lines[-2].split() == ["seed", "7"]
    assert found["weights"] == weights_hash("tiny") and found["weights"] in lines[-1]
    assert found["in_memory"] is None and found._ipython_display_() is None


def test_about_a_loaded_model_says_what_is_in_memory(capsys):
    model = load("tiny", device="cpu", verify=False)
    before = about(model)
    assert (before["model"], before["device"], before["dtype"]) == ("tiny", "cpu", "float32")
    assert before["weights"] == weights_hash("tiny")
    with torch.no_grad():
        next(model.hf.parameters()).mul_(2)
    after = about(model)
    assert after["weights"] == before["weights"] and after["in_memory"] != before["in_memory"]
    assert after["in_memory"] in capsys.readouterr().out


def test_about_hub_ids_and_nonsense(capsys):
    assert about("owner/name")["weights"] is None and "not hashed" in capsys.readouterr().out
    with pytest.raises(ModelError, match="no checkpoint"):
        about("/no/such/folder")
