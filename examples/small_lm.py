"""Trains a small Llama from scratch on the text of preference pairs, with GPT-2's vocabulary.

For trying the method on real text where no pretrained model is at hand:

    python examples/small_lm.py --dataset_name pairs.jsonl.gz --vocab encoder.json \
        --merges vocab.bpe --output_dir small-lm
"""

import argparse

from demo.corpus import pretrain_lm
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from segrlhf.data.load import load_rows
from segrlhf.runtime import files
from segrlhf.runtime.checkpoints import check_output_dir

PIECE = 1000  # characters of one training text


def gpt2_tokenizer(vocab: str, merges: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE.from_file(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, bos_token=end, pad_token=end
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset_name", required=True, help="preference pairs with a prompt")
    parser.add_argument("--vocab", required=True, help="GPT-2's encoder.json")
    parser.add_argument("--merges", required=True, help="GPT-2's vocab.bpe")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    check_output_dir(args.output_dir, resume=False, sign="config.json")

    tokenizer = gpt2_tokenizer(args.vocab, args.merges)
    pieces = []
    for row in load_rows(args.dataset_name, "train"):
        for response in (row["chosen"], row["rejected"]):
            text = row["prompt"] + response
            pieces += [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
    print(f"{len(pieces)} texts of up to {PIECE} characters")
    model = pretrain_lm(
        pieces,
        tokenizer,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=args.layers,
        max_position_embeddings=1024,
    )
    with files.files_into(args.output_dir) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    print(f"{model.num_parameters():,} parameters in {args.output_dir}")


if __name__ == "__main__":
    main()
