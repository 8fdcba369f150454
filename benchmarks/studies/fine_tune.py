"""Fine-tune an encoder on labelled texts with the stock Trainer: what the door and the other studies begin with.

    python benchmarks/studies/fine_tune.py --model_name_or_path google-bert/bert-base-uncased \
        --train_file train.jsonl --num_train_epochs 2 --learning_rate 5e-5 --output_dir build/teacher
    python benchmarks/studies/fine_tune.py arguments.json

Every argument of `TrainingArguments` may be given.
"""

import sys
from pathlib import Path

from smoke import make_smoke_texts
from tasks import TextArguments, TextTask
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed


def main() -> None:
    """Train and save the model with its tokenizer."""
    parser = HfArgumentParser((TextArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        arguments, args = parser.parse_json_file(sys.argv[1])
    else:
        arguments, args = parser.parse_args_into_dataclasses()
    if arguments.smoke:
        make_smoke_texts(arguments, Path(args.output_dir) / "inputs")
    task = TextTask(arguments, seed=args.seed)
    set_seed(args.seed)  # a new head is drawn
    trainer = Trainer(task.new_model(), args, task.collator, task.train_dataset, processing_class=task.tokenizer)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
