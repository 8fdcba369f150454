"""A tiny task of language models: a decoder from scratch, or an encoder-decoder from a folder."""

from pathlib import Path

from labelled_text import make_smoke_task
from language_task import LanguageArguments, LanguageTask, make_smoke_text, train_tokenizer
from transformers import T5Config, T5ForConditionalGeneration


def make_task(folder, kind="llama", *, labelled=True, layers=1, **settings):
    """Make texts, and labelled ones if asked for, and a task for gpt2, llama or t5."""
    arguments = LanguageArguments(**{"max_validation_blocks": 5, **settings})
    make_smoke_text(arguments, folder)
    if labelled:
        make_smoke_task(arguments, folder)
    if kind == "t5":
        arguments.block_size = 48 if labelled else 16
        tokenizer = train_tokenizer(Path(arguments.train_file).read_text() + " bad good film of hours." * 20, 350)
        tokenizer.save_pretrained(folder / "t5")
        sizes = {"vocab_size": len(tokenizer), "d_model": 16, "d_kv": 4, "d_ff": 32, "num_heads": 2}
        config = T5Config(**sizes, num_layers=layers, decoder_start_token_id=0)
        T5ForConditionalGeneration(config).save_pretrained(folder / "t5")
        arguments.from_scratch, arguments.model_name_or_path = False, str(folder / "t5")
    else:
        arguments.architecture = kind
    return LanguageTask(arguments)
