"""``make shapes``: train the built-in model from scratch. Stopped anywhere, the next call goes on."""

from __future__ import annotations

import argparse
import shutil
import time
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file

from ...checkpoint.layout import BUILT_IN, Checkpoint
from ...tokens import Tokens
from ..studio import Studio
from ..world import SIDE, SUMMARY
from . import backbone, data, decoder, export, text, tokenizer, vae
from .curriculum import Curriculum, Example
from .further import FurtherCurriculum
from .loop import averaged, train

SEED = 0
SIZES = {"drawing": SIDE, "understanding": SIDE, "editing": tokenizer.SMALL, "upscale": 2}  # pixels, and a factor
STAGES = ("text", "tokenizer", "vae", "data", "decoder", "turbo", "backbone")
MORE = ("further", "snapshot")
STAGES_HELP = (
    f"left out: {', '.join(STAGES)}, which made the weights that are shipped. `further` goes on from the checkpoint in "
    "--out, and needs nothing else; `snapshot` writes what that has learned so far as a whole checkpoint into another "
    "--out, to be measured"
)


def main() -> None:
    """Run the stages; what is done already is only read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/shapes"), help="where states and data are kept")
    parser.add_argument("--out", type=Path, default=BUILT_IN, help="the checkpoint to write")
    parser.add_argument("--stages", nargs="*", choices=(*STAGES, *MORE), default=STAGES, help=STAGES_HELP)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    training = Training(arguments.work, arguments.out)
    for stage in arguments.stages:
        began = time.monotonic()
        getattr(training, stage)()
        _say(f"{stage}: {(time.monotonic() - began) / 60:.1f} minutes")
    logs = arguments.out / "training"
    logs.mkdir(exist_ok=True)
    for log in arguments.work.glob("**/*.tsv"):
        shutil.copy(log, logs)


class Training:
    """The stages in their order. Each reads what the ones before it left in ``work``, and writes its part of ``out``."""

    def __init__(self, work: Path, out: Path) -> None:
        self.work, self.out = work, out

    def text(self) -> None:
        """The config and the text tokenizer."""
        export.write_text(self.out, backbone.CONFIG, SIZES, text.sentences(), SUMMARY)

    def tokenizer(self) -> None:
        """The image tokenizer."""
        trained = self._tokenizer
        export.write_image_tokenizer(self.out, trained.vision, trained.quantiser, tokenizer.CONFIGS)

    def vae(self) -> None:
        """The VAE, first on pictures of half the size, then on whole ones, and last its decoder alone."""
        trained = self._autoencoder
        trained.model.decoder.requires_grad_(True)
        self._train("vae-decoding", trained, trained.decoding_losses, vae.DECODING)
        export.write_vae(self.out, trained.model, vae.CONFIG | trained.scaling)

    def data(self) -> None:
        """Pictures as codes and latents."""
        self._examples, self._pictures  # noqa: B018  made once, then read

    def decoder(self) -> None:
        """The decoder, first on random codes, then on pictures; and the prior."""
        export.write_prior(self.out, self._decoder.prior.state_dict())
        self._write_decoder("decoder", self._decoder)

    def turbo(self) -> None:
        """The turbo decoder, from the full one."""
        teacher = self._decoder
        torch.manual_seed(SEED)
        turbo = decoder.Turbo(teacher)
        turbo = self._train("turbo", turbo, turbo.losses(*self._pictures), decoder.TURBO)
        self._write_decoder("decoder-turbo", turbo.student)

    def backbone(self) -> None:
        """The backbone: first mostly drawing, then mostly editing, and then what an edit only copies too."""
        tokens = Tokens(Checkpoint(self.out))
        torch.manual_seed(SEED)
        learner = backbone.Learner()
        learner.begin_with(self._tokenizer.book(backbone.CONFIG.hidden_size))
        for name, stage in backbone.STAGES.items():
            lessons = Curriculum(tokens, self._examples, stage.scrambled)
            learner.requires_grad_(True)
            learner = self._train(name, learner, backbone.losses(learner, lessons, stage.turns), stage.schedule)
        export.write_backbone(self.out, learner.network.state_dict())

    def further(self) -> None:
        """What the backbone learns after that, from a checkpoint alone: its words, its pictures as codes, its weights."""
        lessons, learner = self._begin_further()
        for name, stage in backbone.FURTHER.items():
            if stage.mean_of:
                learner = averaged(stage.mean_of, learner, self._further)[0]
            learner.requires_grad_(True)
            learner.network.requires_grad_(name != "backbone-heads")
            of = backbone.losses(learner, lessons, stage.turns)
            learner = train(name, learner, of, stage.schedule, self._further, _say)
            lessons.scrambled = stage.scrambled
        self._write_learned()

    def snapshot(self) -> None:
        """A whole checkpoint in ``out`` with what has been learned further so far."""
        if self.out.resolve() == BUILT_IN.resolve():
            raise SystemExit("A snapshot would overwrite the built-in model. Name another folder with --out.")
        shutil.copytree(BUILT_IN, self.out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("mlx-*"))
        self._write_learned()

    def _write_learned(self) -> None:
        """The weights of the stage that was begun last, or at the end those of a few in the mean; and the words."""
        begun = [name for name in backbone.FURTHER if (self._further / f"{name}.pt").exists()]
        if not begun:
            raise SystemExit(f"Nothing has been learned further in {self.work} yet.")
        chosen = backbone.BLENDED if begun == list(backbone.FURTHER) else begun[-1:]
        learner, steps = averaged(chosen, backbone.Learner(), self._further)
        export.write_backbone(self.out, learner.network.state_dict())
        shutil.copy(self._further / "tokenizer.json", self.out)
        _say(f"{', '.join(dict.fromkeys(chosen))}, after {steps} steps: {self.out}")

    @property
    def _further(self) -> Path:
        return self.work / "further"

    def _begin_further(self) -> tuple[FurtherCurriculum, backbone.Learner]:
        """The lessons, and a learner with the weights of ``out``."""
        torch.manual_seed(SEED)
        self._further.mkdir(exist_ok=True)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(self.out / name, self._further)
        words = text.add_words(self._further / "tokenizer.json", backbone.TEXT_IDS, text.further_sentences())
        encoder = tokenizer.Tokenizer().load_published(self.out / "image_tokenizer/image_tokenizer.safetensors")
        examples = data.examples(self._further, encoder, _say)
        own = data.own(self._further, Studio(Checkpoint(self.out)), examples, _say)
        material = data.material(self._further, encoder, _say)
        lessons = FurtherCurriculum(Tokens(Checkpoint(self._further)), examples, material, own)
        learner = backbone.Learner()
        weights = load_file(self.out / "model.safetensors")
        learner.network.load_state_dict({name: value.float() for name, value in weights.items()})
        learner.begin_words(words)
        return lessons, learner

    def _train(self, name: str, module: torch.nn.Module, losses, schedule) -> torch.nn.Module:
        return train(name, module, losses, schedule, self.work, _say)

    def _write_decoder(self, folder: str, trained: decoder.FlowDecoder) -> None:
        config = decoder.CONFIG | {"cap_feat_dim": decoder.FEATURES}
        export.write_decoder(self.out / folder, trained.transformer, config)

    @cached_property
    def _tokenizer(self) -> tokenizer.Tokenizer:
        torch.manual_seed(SEED)
        module = tokenizer.Tokenizer()
        return export.rounded(self._train("tokenizer", module, module.losses, tokenizer.SCHEDULE))

    @cached_property
    def _autoencoder(self) -> vae.Autoencoder:
        torch.manual_seed(SEED)
        module = vae.Autoencoder()
        module = self._train("vae-half", module, module.half_losses, vae.HALF)
        module.requires_grad_(True)
        return export.rounded(self._train("vae-whole", module, module.whole_losses, vae.WHOLE))

    @cached_property
    def _decoder(self) -> decoder.FlowDecoder:
        torch.manual_seed(SEED)
        module = decoder.FlowDecoder()
        self._train("decoder-positions", module, module.position_losses, decoder.POSITIONS)
        module.requires_grad_(True)
        module.begin_with(self._tokenizer.book(decoder.FEATURES))
        return self._train("decoder", module, decoder.picture_losses(module, *self._pictures), decoder.PICTURES)

    @cached_property
    def _examples(self) -> list[Example]:
        return data.examples(self.work, self._tokenizer, _say)

    @cached_property
    def _pictures(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and latents."""
        return data.codes(self.work, self._tokenizer, _say), data.latents(self.work, self._autoencoder, _say)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
