"""A model that `export_onnx` wrote, in ONNX Runtime, where a transformers model fits."""

import re
from collections.abc import Mapping
from importlib import import_module
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_moebert.runtime.chains import CHAIN_FILE, Chain, load_chain
from hf_moebert.runtime.folders import make_options, read_manifest
from hf_moebert.runtime.verifying import check_golden


class OnnxModel(nn.Module):
    """An exported model with the configuration, the arguments and the outputs of the model it was.

    It computes on the CPU, without gradients, and holds no parameters. That of `load_onnx` is of a subclass named like
    the model's class, by which pipelines know what it can do.

    Args:
        exported: What `transformers.exporters.ExportedModel.from_pretrained` returned.
        max_length: Tokens that a text may have, or None if there is no limit.

    Attributes:
        kind: What it answers, as `hf_moebert.runtime.TextModel.kind`.
        sizes: Of the model that was exported: "parameters", "active_parameters" for one token, and the "vocabulary".
    """

    base_model_prefix = ""
    kind = "other"
    sizes: Mapping[str, int] = MappingProxyType({})
    dtype = torch.float32
    device = torch.device("cpu")
    generation_config = None

    def __init__(self, exported: Any, max_length: int | None) -> None:
        super().__init__()
        self.exported, self.max_length, self.config = exported, max_length, exported.config
        self.input_names = list(next(iter(exported.components.values())).metadata.kwargs)
        self.main_input_name = self.input_names[0]
        self.eval()

    @property
    def base_model(self) -> "OnnxModel | None":
        """Return the model itself if it has no head, otherwise None: the body cannot be run alone."""
        return self if self.kind == "embedding" else None

    def can_generate(self) -> bool:
        """Return that it writes no texts."""
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Run the graph.

        Args:
            input_ids: Shape `(batch, seq)`.
            attention_mask: 1 at real tokens, all of them by default. Shape `(batch, seq)`.
            token_type_ids: Zero by default, and left out if the graph does not read them. Shape `(batch, seq)`.
            pixel_values: For models of images. Shape `(batch, channels, height, width)`.
            return_dict: Whether to return the model's output class, or a tuple.
            others: Arguments that must be None: a graph computes one thing.

        Raises:
            ValueError: If an argument is not one of the graph's, or a text is too long.
        """
        given = {"input_ids": input_ids, "pixel_values": pixel_values}
        main = given[self.main_input_name]
        unknown = sorted(name for name, value in others.items() if value is not None)
        if unknown or main is None or not main.numel():
            missing = f"no {self.main_input_name}" if main is None else f"an empty {self.main_input_name}"
            problem = f"also {unknown}" if unknown else missing
            raise ValueError(
                f"An exported model takes {self.input_names}, got {problem}. Run it in torch for anything else."
            )
        if input_ids is not None:
            if self.max_length is not None and input_ids.shape[1] > self.max_length:
                raise ValueError(
                    f"Sequences must have 1 to {self.max_length} tokens, got {input_ids.shape[1]}. Truncate longer "
                    "ones."
                )
            given["attention_mask"] = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
            given["token_type_ids"] = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        outputs = self.exported(**{name: given[name] for name in self.input_names})
        return outputs if return_dict else outputs.to_tuple()

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Return the first output of the graph for arrays of its inputs."""
        return self(**{name: torch.from_numpy(array) for name, array in inputs.items()})[0].numpy()


class TensorChain:
    """The CRF of an exported tagger on tensors, with the methods of `MaskedCRF` that pipelines call.

    Args:
        chain: Its scores.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain, self.tag_scheme = chain, chain.scheme

    def decode(self, emissions: Tensor, mask: Tensor) -> Tensor:
        """Find the best tags, -100 off words: `(batch, seq, tags)` and `(batch, seq)` to `(batch, seq)`."""
        return torch.from_numpy(self.chain.decode(emissions.numpy(), mask.numpy()))

    def marginals(self, emissions: Tensor, mask: Tensor) -> Tensor:
        """Compute the probability of each tag, zero off words: to `(batch, seq, tags)`."""
        return torch.from_numpy(self.chain.marginals(emissions.numpy(), mask.numpy()))


class OnnxTagger(OnnxModel):
    """An exported tagger with a CRF, whose emissions are decoded outside of the graph.

    Args:
        exported: As for `OnnxModel`.
        max_length: As for `OnnxModel`.
        chain: Scores of the CRF.
    """

    def __init__(self, exported: Any, max_length: int | None, chain: Chain) -> None:
        super().__init__(exported, max_length)
        self.crf = TensorChain(chain)

    def forward(
        self, *args: Any, word_mask: Tensor | None = None, output_marginals: bool = False, **kwargs: Any
    ) -> Any:
        """Run the graph, and decode what it gives.

        Args:
            *args: As for `OnnxModel`.
            word_mask: True at the first piece of each word. Shape `(batch, seq)`.
            output_marginals: Whether to return the probability of each tag.
            **kwargs: As for `OnnxModel`.

        Raises:
            ValueError: As for `OnnxModel`, and if nothing says which tokens are words.
        """
        return_dict = kwargs.pop("return_dict", True)
        outputs = super().forward(*args, **kwargs)
        if word_mask is None:
            raise ValueError(
                '`word_mask` must mark the first piece of each word, got None. Use `pipeline("masked-crf", ...)`, '
                'which marks them: "token-classification" knows no CRF.'
            )
        mask = word_mask.bool()
        outputs["predictions"] = self.crf.decode(outputs.logits, mask)  # (batch, seq)
        if output_marginals:
            outputs["marginals"] = self.crf.marginals(outputs.logits, mask)  # (batch, seq, tags)
        return outputs if return_dict else outputs.to_tuple()


def load_onnx(folder: str | PathLike[str], *, precision: str | None = None, threads: int | None = None) -> OnnxModel:
    """Load a model that `export_onnx` wrote, for a pipeline or whatever calls a model.

    Args:
        folder: The folder.
        precision: "float32" or "int8", by default float32 if it was exported.
        threads: Threads to compute with, by default those of torch; one computes in the thread that calls.

    Raises:
        ValueError: If a file is not as it was exported, if the precision was not exported or computes something else
            on this processor, or if ONNX Runtime is not installed.
        FileNotFoundError: If the folder holds no export.
    """
    manifest, precision = read_manifest(folder, precision)
    graph = open_exported(Path(folder) / precision, threads)
    model = OnnxModel(graph, manifest["max_length"])
    if precision == "int8":
        check_golden(folder, precision, model.run)
    chain = [load_chain(folder)] if (Path(folder) / CHAIN_FILE).is_file() else []
    base = OnnxTagger if chain else OnnxModel
    named = type(manifest["architecture"], (base,), {"__doc__": base.__doc__})
    model = named(graph, manifest["max_length"], *chain)
    model.kind, model.sizes = manifest["kind"], manifest["sizes"]
    return model


def open_exported(folder: Path, threads: int | None) -> Any:
    """Open one graph with its configuration."""
    from transformers.exporters import ExportedModel

    # Classes of outputs are known to torch once their module is imported
    for module in set(
        re.findall(r"(hf_moebert(?:\.\w+)+)\.\w+", (folder / "export.json").read_text(encoding="utf-8"))
    ):
        import_module(module)
    options = make_options(torch.get_num_threads() if threads is None else threads)
    return ExportedModel.from_pretrained(folder, device="cpu", local_files_only=True, session_options=options)
