"""The dense optimizer against plain torch, and the settings of a run."""

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.runs.run_folder import settings_text
from pipeline.train.optimizer import DenseOptimizer
from schemas.settings import load_settings
from schemas.train import DenseSettings, TrainSettings, differing


def model_and_twin() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model, twin = nn.Linear(5, 3), nn.Linear(5, 3)
    twin.load_state_dict(model.state_dict())
    return model, twin


def backward(model: nn.Module, seed: int) -> None:
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(values).square().sum().backward()


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_warmup_and_clipping(kind: str) -> None:
    model, twin = model_and_twin()
    settings = DenseSettings(optimizer=kind, learning_rate=0.1, weight_decay=0.01, warmup_steps=4, clip_norm=0.5)
    optimizer = DenseOptimizer(model, settings)
    plain = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind](twin.parameters(), weight_decay=0.01)
    for step in range(8):
        if step == 3:  # goes on in another one
            state = optimizer.state_dict()
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            optimizer = DenseOptimizer(model, settings)
            optimizer.prepare_to_load()
            optimizer.load_state_dict(state)
            model.load_state_dict(weights)
        backward(model, step)
        optimizer.step()
        backward(twin, step)
        norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        plain.param_groups[0]["lr"] = 0.1 * min(1, (step + 1) / 4)
        plain.step()
        assert optimizer.learning_rate == pytest.approx(plain.param_groups[0]["lr"])
        assert optimizer.gradient_norm == pytest.approx(norm)
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one, other)


def test_settings_survive_their_file(tmp_path: Path) -> None:
    settings = load_settings(
        TrainSettings,
        [],
        [
            "model.retrieved={ads: 4, content: 6}",
            "stream.sequences.ads.length=10",
            "stream.sequences.content={length: 20, scene: [feed]}",
            "model.attention.features.item.dim=32",
            "dense.clip_norm=1",
        ],
    )
    (tmp_path / "settings.yaml").write_text(settings_text(settings))
    assert load_settings(TrainSettings, [tmp_path / "settings.yaml"]) == settings
    changed = differing(settings, TrainSettings())
    assert changed["dense.clip_norm"] == (1.0, None)
    assert changed["stream.sequences.content.scene"] == (["feed"], None)
    assert not differing(settings, settings)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stream.history_length=0", "stream.history_length: input should be greater than 0"),
        ("model.retrieved.history=0", "model.retrieved.history: input should be greater than 0"),
        ("validation.metric=f1", "validation.metric: input should be 'auc' or 'gauc'"),
        ("dense.lr=1", "dense.lr: unknown key; allowed here: clip_norm, final_fraction, learning_rate"),
        ("model.attention.dim=6", "model.attention.dim: input should be a multiple of 4"),
    ],
)
def test_impossible_settings(override: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_settings(TrainSettings, [], [override])
    assert message in str(error.value)


def test_a_section_of_a_file_is_a_mapping(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    for text, key in (("model: 3", "model"), ("model: {attention: [16]}", "model.attention"), ("stream:", "stream")):
        file.write_text(text)
        with pytest.raises(ValueError) as error:
            load_settings(TrainSettings, [file], ["model=dare", "model.attention.dim=16", "stream.batch_size=8"])
        assert str(error.value).startswith(f"{file}: {key}: a mapping of settings is wanted, not ")
