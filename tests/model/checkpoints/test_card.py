"""The model card in every saved folder, and what is uploaded to the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import transformers as hf
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from torch import nn

import peanut
from peanut import LoraConfig, PeanutError, REDConfig, get_peft_model
from peanut.model.checkpoints.card import _THEIRS
from peanut.protocols.registry import registered

from ...support import PEER_WARNINGS

pytestmark = PEER_WARNINGS

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def llama(name: str = "owner/base") -> Any:
    config = hf.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = hf.LlamaForCausalLM(config)
    model.config._name_or_path = model.name_or_path = name
    return model


def lora(task: str | None = "CAUSAL_LM", name: str = "owner/base") -> Any:
    return get_peft_model(llama(name), LoraConfig(target_modules=["q_proj"], task_type=task))


def test_a_saved_folder_has_a_card_with_what_hugging_face_peft_writes(tmp_path: Path) -> None:
    lora().save_pretrained(tmp_path / "ours")
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    own, other = (ModelCard.load(tmp_path / each / "README.md").data.to_dict() for each in ("ours", "theirs"))
    assert own | {"tags": None} == other | {"tags": None}
    assert set(own["tags"]) == {*other["tags"], "peanut"}
    assert own["base_model"] == "owner/base"


def test_a_text_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n# Mine\n\nTrained at night.\n")
    model = lora()
    model.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_text()
    card = ModelCard(first)
    assert card.text.lstrip().startswith("# Mine\n\nTrained at night.\n\n### Framework versions\n\n- PEANuT ")
    data = card.data.to_dict()
    assert (data["license"], data["library_name"]) == ("mit", "peft")
    assert {"mine", "lora", "transformers"} <= set(card.data.tags or ())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == first
    peft.PeftModel.from_pretrained(llama(), tmp_path).create_or_update_model_card(str(tmp_path))
    model.create_or_update_model_card(tmp_path)
    both = (tmp_path / "README.md").read_text()
    assert both.count("- PEANuT ") == both.count("- PEFT ") == both.count("### Framework versions") == 1


def test_a_card_that_cannot_be_read_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\n[: {\n---\ntext")
    with pytest.warns(UserWarning, match="left as it is"):
        lora().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "---\n[: {\n---\ntext"
    assert sorted(os.listdir(tmp_path)) == FILES


def test_a_base_without_a_name_on_the_hub_is_not_named(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    lora(None, str(tmp_path / "base")).save_pretrained(tmp_path / "a")
    data = ModelCard.load(tmp_path / "a" / "README.md").data
    assert (data.base_model, data.pipeline_tag) == (None, None)
    get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"])).save_pretrained(tmp_path / "b")
    assert ModelCard.load(tmp_path / "b" / "README.md").data.tags == ["lora", "peanut"]


def test_the_library_is_the_one_that_reads_the_files(tmp_path: Path) -> None:
    known = {str(each.value) for each in peft.PeftType}
    assert {name for name in registered() if _THEIRS.fullmatch(name)} == known & registered().keys()
    get_peft_model(llama(), REDConfig()).save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.to_dict()["library_name"] == "peanut"


class Hub:
    """What is asked of the hub, and what a repository has there."""

    def __init__(self, **_: Any) -> None:
        pass

    held: Path | None = None
    uploaded: dict[str, str | bytes]
    asked: dict[str, Any]
    refuses = False

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        if Hub.refuses:
            raise OSError("401 Unauthorized\nand more")
        Hub.asked = {"repo": options}
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_branch(self, repo_id: str, **options: Any) -> None:
        Hub.asked["branch"] = options["branch"]

    def upload_folder(self, *, folder_path: str, **options: Any) -> str:
        Hub.asked |= options
        files = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        Hub.uploaded = {str(path.relative_to(folder_path)): path.read_bytes() for path in files}
        return "where it is"


def downloaded(repo: str, name: str, **_: Any) -> str:
    if Hub.held is None:
        raise OSError("404")
    return str(Hub.held / name)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", downloaded)
    Hub.held, Hub.uploaded, Hub.asked, Hub.refuses = None, {}, {}, False
    return Hub


def test_the_adapter_is_uploaded_and_never_the_base(hub: type[Hub]) -> None:
    model = lora()
    model.add_adapter("b", LoraConfig(target_modules=["v_proj"]))
    assert model.push_to_hub("me/mine", private=True, tags=["cats"], revision="try") == "where it is"
    assert sorted(hub.uploaded) == [*FILES, *(f"b/{name}" for name in FILES)]
    assert max(len(content) for content in hub.uploaded.values()) < 8000
    assert "cats" in (ModelCard(bytes(hub.uploaded["README.md"]).decode()).data.tags or ())  # type: ignore[arg-type]
    assert hub.asked["repo"] == {"private": True, "exist_ok": True}
    assert (hub.asked["repo_id"], hub.asked["revision"], hub.asked["branch"]) == ("me/mine", "try", "try")
    assert hub.asked["commit_message"] == "Upload model"


def test_an_adapter_is_uploaded_that_is_not_active(hub: type[Hub]) -> None:
    model = lora()
    model.set_adapter([])
    model.push_to_hub("me/mine", tags=["cats"])
    assert sorted(hub.uploaded) == FILES
    assert "cats" in (ModelCard(bytes(hub.uploaded["README.md"]).decode()).data.tags or ())  # type: ignore[arg-type]


def test_the_card_that_a_repository_has_is_kept(hub: type[Hub], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    hub.held = tmp_path
    lora().push_to_hub("me/mine", commit_message="more")
    assert b"# Mine\n" in bytes(hub.uploaded["README.md"])  # type: ignore[arg-type]
    assert hub.asked["commit_message"] == "more"


def test_a_config_is_uploaded_alone(hub: type[Hub]) -> None:
    assert LoraConfig(r=4).push_to_hub("me/mine") == "where it is"
    assert sorted(hub.uploaded) == ["adapter_config.json"]
    assert hub.asked["commit_message"] == "Upload config"


def test_an_option_that_there_is_not_is_one_line(hub: type[Hub]) -> None:
    for each in (lora(), LoraConfig()):
        with pytest.raises(PeanutError, match=r"^push_to_hub is given 'organisation'; expected keywords .*private"):
            each.push_to_hub("me/mine", organisation="us")
    assert hub.uploaded == {}


def test_what_the_hub_refuses_is_one_line(hub: type[Hub]) -> None:
    hub.refuses = True
    with pytest.raises(PeanutError, match=r"^'me/mine' is not uploaded: 401 Unauthorized; check its name") as refused:
        lora().push_to_hub("me/mine")
    assert "\n" not in str(refused.value)
    assert issubclass(HfHubHTTPError, OSError)
    assert peanut.PeftModel.push_to_hub is not hf.PreTrainedModel.push_to_hub
