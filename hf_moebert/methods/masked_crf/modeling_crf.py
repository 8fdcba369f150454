"""The layer: a linear-chain CRF that knows which tag sequences are legal."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .functional import log_partition, marginals, sequence_score
from .functional_decoding import best_sequences, make_finite, viterbi
from .functional_passes import Scores
from .functional_schemes import fitting_schemes, infer_scheme
from .functional_tags import (
    Legality,
    are_legal,
    check_number,
    check_options,
    legal_moves,
    name_scheme,
    repair_tags,
)
from .functional_words import pack_words, unpack_words
from .modeling_rates import ScoresWithRate


logger = logging.get_logger(__name__)


class MaskedCRF(ScoresWithRate):
    """A linear-chain CRF over the words of each row that can forbid illegal tag sequences.

    Tensors are batch-first. `mask` is True at words, in any pattern: padding, special tokens and the later pieces of a
    word are skipped. A row may have no words. Sums are computed in float32, or in float64 for emissions in float64,
    under autocast as well. Scores of illegal moves are ordinary parameters; while masked they are never read, and
    their gradient is zero. While the loss is computed, scores move at a rate of their own, `score_rate`.

    Args:
        labels: Name of each tag, such as "O", "B-PER", "I-PER".
        tag_scheme: A key of `SCHEMES` or `ALIASES`, "none" (every sequence is legal), or "auto": inferred. Tags that
            may be of IOB2 or IOB1 are taken for IOB2, with a warning, until labels are seen that are of IOB1 alone.
        mask_transitions: "training" masks in the loss and in decoding, "decoding" in decoding only, "off" nowhere.
        illegal_labels: How the loss treats illegal labels under "training": "error" refuses them; "ignore" leaves
            such rows out; "repair" keeps their segments and rewrites them legally; "soft" gives illegal moves the
            score `illegal_score` instead of forbidding them, as the paper does. Decoding is never soft.
        illegal_score: Score of an illegal move under "soft".

    Raises:
        ValueError: If an option does not exist, the labels do not fit the scheme, or no sequence can end after one.

    Source: Wei et al. 2021, https://arxiv.org/abs/2103.10682, section 3. Forbidding outright, the masks of start and
    end, the policies but "soft", and scores that start at zero are our own design.
    """

    legal: Tensor
    legal_start: Tensor
    legal_end: Tensor

    def __init__(
        self,
        labels: Sequence[str],
        *,
        tag_scheme: str = "auto",
        mask_transitions: str = "training",
        illegal_labels: str = "error",
        illegal_score: float = -100.0,
    ) -> None:
        super().__init__()
        check_options(tag_scheme, mask_transitions, illegal_labels, illegal_score)
        self.labels = list(labels)
        if not self.labels or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"`labels` must be names that differ, at least one, got {self.labels[:5]}.")
        check_number(self.labels)
        if mask_transitions == "off" and tag_scheme == "auto":
            tag_scheme = "none"  # nothing to infer, and nothing to refuse
        self.tag_scheme = infer_scheme(self.labels) if tag_scheme == "auto" else name_scheme(tag_scheme)
        rivals = set(fitting_schemes(self.labels)) - {self.tag_scheme} if tag_scheme == "auto" else set()
        self.rival = next(iter(rivals), None)  # the other scheme, until labels show that it is not
        if self.rival:
            logger.warning_once(
                f"`tag_scheme` takes the tags for {self.tag_scheme}, as most data sets mean them, though they may be "
                f"of {self.rival}. Name it, or give `labels` of the data to `from_dense`."
            )
        self.mask_transitions, self.illegal_labels = mask_transitions, illegal_labels
        self.illegal_score = illegal_score
        self.transitions = nn.Parameter(torch.zeros(len(self.labels), len(self.labels)))  # (tags, tags)
        self.start = nn.Parameter(torch.zeros(len(self.labels)))  # (tags,)
        self.end = nn.Parameter(torch.zeros(len(self.labels)))  # (tags,)
        device = "cpu" if self.start.is_meta else self.start.device  # masks are not in checkpoints
        for name, mask in zip(("legal", "legal_start", "legal_end"), self.legality(), strict=True):
            self.register_buffer(name, mask.to(device), persistent=False)

    def legality(self) -> Legality:
        """Compute the masks from the labels, on the CPU."""
        return legal_moves(self.labels, self.tag_scheme)

    def extra_repr(self) -> str:
        """Return what the representation shows."""
        return f"{len(self.labels)} tags, {self.tag_scheme}, mask_transitions={self.mask_transitions}"

    def log_likelihood(self, emissions: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
        """Compute the logarithm of the probability of each row's tags.

        Args:
            emissions: Score of each tag. Shape `(batch, seq, tags)`.
            tags: Anything off words. Shape `(batch, seq)`.
            mask: True at words. Shape `(batch, seq)`.

        Returns:
            Logarithms; 0 for rows without words and for those that "ignore" leaves out. Shape `(batch,)`.

        Raises:
            ValueError: If shapes disagree, a tag does not exist, or a row is illegal and the policy is "error".
        """
        return self.likelihood_and_rows(emissions, tags, mask)[0]

    def likelihood_and_rows(
        self, emissions: Tensor, tags: Tensor, mask: Tensor, *, illegal_labels: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute `log_likelihood`, and which rows count: those with words that no policy leaves out.

        Args:
            emissions: Shape `(batch, seq, tags)`.
            tags: Shape `(batch, seq)`.
            mask: Shape `(batch, seq)`.
            illegal_labels: Policy for this call, in place of the layer's own.

        Returns:
            Both of shape `(batch,)`, the second boolean.
        """
        self._check(emissions, mask, tags)
        self._check_guess(tags, mask)
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.give_rate()
        policy = illegal_labels or self.illegal_labels
        with torch.autocast(emissions.device.type, enabled=False):
            words, lengths, _ = pack_words(_promote(emissions), mask)
            gold = pack_words(tags, mask)[0]  # (words, batch)
            scores, dropped = self.scores_for("training", words.dtype), torch.zeros_like(lengths, dtype=torch.bool)
            if self.mask_transitions == "training" and policy != "soft":
                gold, dropped = self._treat_illegal(gold, lengths, policy)
            # What is left out is set to zero on both sides: the difference of two infinities has no gradient.
            gold_score = sequence_score(words, gold, lengths, scores).masked_fill(dropped, 0)  # (batch,)
            total = log_partition(words, lengths, scores).masked_fill(dropped, 0)  # (batch,)
        return gold_score - total, (lengths > 0) & ~dropped

    def log_partition(self, emissions: Tensor, mask: Tensor) -> Tensor:
        """Compute the logarithm of the sum over all tag sequences that the loss sees; see `log_likelihood`."""
        self._check(emissions, mask)
        with torch.autocast(emissions.device.type, enabled=False):
            words, lengths, _ = pack_words(_promote(emissions), mask)
            return log_partition(words, lengths, self.scores_for("training", words.dtype))

    @torch.no_grad()
    def marginals(self, emissions: Tensor, mask: Tensor) -> Tensor:
        """Compute the probability of each tag of each word, over all sequences that decoding may return.

        Args:
            emissions: Shape `(batch, seq, tags)`.
            mask: Shape `(batch, seq)`.

        Returns:
            Probabilities, zero off words. Shape `(batch, seq, tags)`, float32 or float64.
        """
        self._check(emissions, mask)
        with torch.autocast(emissions.device.type, enabled=False):
            words, lengths, positions = pack_words(make_finite(emissions), mask)
            found = marginals(words, lengths, self.scores_for("decoding", words.dtype))
            return unpack_words(found, mask, positions, fill=0.0)

    @torch.no_grad()
    def decode(self, emissions: Tensor, mask: Tensor, *, allowed: Tensor | None = None) -> Tensor:
        """Find the best tag sequence of each row, always a legal one if illegal moves are masked.

        Args:
            emissions: Shape `(batch, seq, tags)`.
            mask: Shape `(batch, seq)`.
            allowed: False at tags that a word must not have. Shape `(batch, seq, tags)`.

        Returns:
            Tags, -100 off words. Shape `(batch, seq)`, int64.

        Raises:
            ValueError: If shapes disagree, or if no legal sequence of a row is allowed.
        """
        words, lengths, positions, scores = self._prepare(emissions, mask, allowed)
        tags = viterbi(words, lengths, scores)  # (words, batch)
        if allowed is not None:
            impossible = sequence_score(words, tags, lengths, scores) == -torch.inf  # (batch,)
            if impossible.any():
                raise ValueError(
                    f"`allowed` must leave each row a legal sequence, row {int(impossible.nonzero()[0])} has none "
                    f"under {self.tag_scheme}. Allow more tags there."
                )
        return unpack_words(tags, mask, positions, fill=-100)

    @torch.no_grad()
    def decode_nbest(self, emissions: Tensor, mask: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Find the `n` best legal tag sequences of each row, best first.

        Args:
            emissions: Shape `(batch, seq, tags)`.
            mask: Shape `(batch, seq)`.
            n: Number of sequences, at least 1.

        Returns:
            Tags, -100 off words and in sequences that a row does not have, shape `(batch, n, seq)`; and the score of
            each sequence, -inf for those that a row does not have, shape `(batch, n)`.

        Raises:
            ValueError: If shapes disagree, or `n` is below 1.
        """
        if n < 1:
            raise ValueError(f"`n` must be at least 1, got {n}.")
        words, lengths, positions, scores = self._prepare(emissions, mask, None)
        if not len(words):  # the one sequence of rows without words is the empty one
            found = torch.full((len(mask), n), -torch.inf, dtype=words.dtype, device=words.device)
            found[:, 0] = 0
            return mask.new_full((len(mask), n, mask.shape[1]), -100, dtype=torch.long), found
        tags, found = best_sequences(words, lengths, scores, number=n)  # (n, words, batch), (n, batch)
        empty = lengths == 0
        found = torch.where(
            empty, torch.where(torch.arange(n, device=mask.device)[:, None] == 0, 0, -torch.inf), found
        )
        paths = [
            unpack_words(path, mask & (score > -torch.inf)[:, None], positions, fill=-100)
            for path, score in zip(tags, found, strict=True)
        ]
        return torch.stack(paths, 1), found.T

    def _prepare(
        self, emissions: Tensor, mask: Tensor, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Scores]:
        self._check(emissions, mask)
        with torch.autocast(emissions.device.type, enabled=False):
            finite = make_finite(emissions)  # (batch, seq, tags)
            if allowed is not None:
                if allowed.shape != emissions.shape or allowed.dtype != torch.bool:
                    raise ValueError(
                        f"`allowed` must be boolean and of the shape {tuple(emissions.shape)}, got {allowed.dtype} "
                        f"and {tuple(allowed.shape)}."
                    )
                finite = finite.masked_fill(~allowed, -torch.inf)
            return *pack_words(finite, mask), self.scores_for("decoding", finite.dtype)

    def scores_for(self, use: str, dtype: torch.dtype) -> Scores:
        """Return the scores for "training" or "decoding", with illegal moves at -inf or at the soft score."""
        scores = Scores(self.transitions.to(dtype), self.start.to(dtype), self.end.to(dtype))
        if self.mask_transitions == "off" or (use == "training" and self.mask_transitions == "decoding"):
            return scores
        illegal = self.illegal_score if use == "training" and self.illegal_labels == "soft" else -torch.inf
        masks = (self.legal, self.legal_start, self.legal_end)
        return Scores(*(score.masked_fill(~mask, illegal) for score, mask in zip(scores, masks, strict=True)))

    def illegal_rows(self, tags: Tensor, mask: Tensor) -> Tensor:
        """Return which rows of tags break the scheme.

        Args:
            tags: Anything off words. Shape `(batch, seq)`.
            mask: True at words. Shape `(batch, seq)`.

        Returns:
            Booleans of shape `(batch,)`.
        """
        packed, lengths, _ = pack_words(tags, mask)  # (words, batch)
        return ~are_legal(packed, lengths, Legality(self.legal, self.legal_start, self.legal_end))

    def _check_guess(self, tags: Tensor, mask: Tensor) -> None:
        """Refuse labels that show that the scheme was guessed wrong, until some show that it was guessed right."""
        if self.rival is None:
            return
        packed, lengths, _ = pack_words(tags, mask)  # (words, batch)
        mine = are_legal(packed, lengths, Legality(self.legal, self.legal_start, self.legal_end))  # (batch,)
        theirs = Legality(*(part.to(tags.device) for part in legal_moves(self.labels, self.rival)))
        other = are_legal(packed, lengths, theirs)
        if (mine & ~other).any():
            self.rival = None
        elif (other & ~mine).any():
            row = int((other & ~mine).nonzero()[0])
            names = " ".join(self.labels[tag] for tag in packed[: lengths[row], row])
            raise ValueError(
                f"`tag_scheme` must be named: row {row} of the batch is {names}, which is of {self.rival} and not of "
                f"{self.tag_scheme}, and the tags may be of either. Set it to {self.rival!r}, or to "
                f"{self.tag_scheme!r} if the row is wrong."
            )

    def _treat_illegal(self, tags: Tensor, lengths: Tensor, policy: str) -> tuple[Tensor, Tensor]:
        """Apply the policy to rows of illegal labels; `tags` is `(words, batch)`.

        Returns:
            The tags, and which rows the loss leaves out, `(batch,)`.
        """
        illegal = ~are_legal(tags, lengths, Legality(self.legal, self.legal_start, self.legal_end))  # (batch,)
        if policy == "ignore" or not illegal.any():
            return tags, illegal
        rows = {
            row: [self.labels[tag] for tag in tags[: lengths[row], row]] for row in illegal.nonzero()[:, 0].tolist()
        }
        if policy == "error":
            row, names = next(iter(rows.items()))
            raise ValueError(
                f"`labels` must follow the tag scheme {self.tag_scheme}, row {row} of the batch is {' '.join(names)}. "
                "Correct the data, set `illegal_labels` to 'repair', 'ignore' or 'soft', or name another `tag_scheme`."
            )
        tags = tags.clone()
        for row, names in rows.items():
            repaired = [self.labels.index(name) for name in repair_tags(names, self.labels, self.tag_scheme)]
            tags[: len(repaired), row] = tags.new_tensor(repaired)
        return tags, torch.zeros_like(illegal)

    def _check(self, emissions: Tensor, mask: Tensor, tags: Tensor | None = None) -> None:
        if emissions.dim() != 3 or emissions.shape[2] != len(self.labels) or not emissions.is_floating_point():
            raise ValueError(
                f"`emissions` must be floats of shape (batch, seq, {len(self.labels)}), got {emissions.dtype} of "
                f"{tuple(emissions.shape)}."
            )
        for name, value in (("mask", mask), ("tags", tags)):
            if value is not None and value.shape != emissions.shape[:2]:
                raise ValueError(
                    f"`{name}` must have the shape {tuple(emissions.shape[:2])} of the emissions, got "
                    f"{tuple(value.shape)}."
                )
        if mask.dtype != torch.bool:
            raise ValueError(f"`mask` must be boolean, got {mask.dtype}. Use `mask.bool()`.")
        if tags is not None:
            wrong = tags[mask & ((tags < 0) | (tags >= len(self.labels)))]
            if wrong.numel():
                raise ValueError(f"`labels` must be in [0, {len(self.labels)}) or -100, got {int(wrong[0])}.")


def _promote(emissions: Tensor) -> Tensor:
    """Promote emissions to float32 at least, which logarithms of sums need."""
    return emissions.to(torch.promote_types(emissions.dtype, torch.float32))
