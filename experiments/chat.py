"""What does it say? A conversation with a model in the terminal.

    python -m experiments.chat --config=PATH

Each line typed is a message; the answer is printed as it comes. An empty line, or the end of the
input, ends it. The model's chat template frames the messages; a model without one gets the
plainest, and one that was never trained to answer continues the text.
"""

import os
import sys
import time

from ternax import measure, processes
from ternax.config import first_layers, with_scheme
from ternax.errors import UsageError
from ternax.experiments import flags, mesh_flag
from ternax.interop.tokenizer import Tokenizer, chat_prompt, printable
from ternax.record import Record, Store, open_store
from ternax.table import row

# Tokens that end an answer in templates in use, where a vocabulary has them.
_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "</s>")
# A conversation's length is padded to a multiple of it, so that programs are used again.
_STEP = 64


def chat_flags(define):
    define.section("Chat")
    define.string("system", None, "what the model is told first", default_text="nothing")
    define.integer("max_tokens", 256, "of an answer", lower=1)
    define.number("temperature", 0.0, "0: always the likeliest token", lower=0.0)
    define.number("top_p", 1.0, "tokens of this share of probability", lower=0.0, upper=1.0)
    define.string("backend", None, "kernel backend", form="NAME", default_text="fastest")


class Conversation:
    """Messages so far, and the model that answers.

    Attributes:
      messages: {"role", "content"} in order.
      stop: ids that end an answer.
      count: tokens of the last answer.
    """

    def __init__(self, model, tokenizer: Tokenizer, *, system: str | None = None, **decoding):
        """decoding: max_tokens, temperature, top_p, seed."""
        self.model, self.tokenizer, self.decoding = model, tokenizer, decoding
        self.messages = [{"role": "system", "content": system}] if system else []
        inner = getattr(tokenizer, "inner", None)
        ends = [inner.token_to_id(word) for word in _ENDS] if inner else []
        self.stop = tuple(sorted({*tokenizer.stop, *(end for end in ends if end is not None)}))
        self.count = 0
        # What asks for the next message ends an answer too, where it is plain text.
        self._next = None if tokenizer.template else "\nuser:"

    def answer(self, text: str):
        """Yields the answer to a message piece by piece; it joins the conversation.

        Raises UsageError where the conversation has filled the model's context.
        """
        import numpy as np

        from ternax import engine
        from ternax.sampling import Sampling

        self.messages.append({"role": "user", "content": text})
        templated = self.tokenizer.template is not None
        prompt = chat_prompt(self.tokenizer, self.messages)
        ids = self.tokenizer.encode(prompt, special=not templated)
        config, most = self.model.config, self.decoding["max_tokens"]
        room = config.max_context - len(ids)
        if room < 1:
            raise UsageError(
                f"the conversation has {len(ids)} tokens, and {config.name} a context of "
                f"{config.max_context}: start anew"
            )
        width = -(-len(ids) // _STEP) * _STEP
        width = width if width + most <= config.max_context else len(ids)
        tokens = np.zeros((1, width), np.int32)
        tokens[0, : len(ids)] = ids
        sampling = Sampling(self.decoding["temperature"], 0, self.decoding["top_p"])
        chunks = engine.stream(
            self.model,
            tokens,
            lengths=np.array([len(ids)]),
            max_new_tokens=min(most, config.max_context - width),
            sampling=sampling,
            seed=self.decoding["seed"],
            stop=self.stop,
        )
        piece, said = self.tokenizer.stream(), ""
        self.count = 0
        for chunk in chunks:
            for i in chunk[0].tolist():
                if i in self.stop:
                    break
                self.count += 1
                new = piece(i)
                said += new
                if self._next and self._next in said:
                    said = said.partition(self._next)[0]
                    break
                yield new
            else:
                continue
            break
        self.messages.append({"role": "assistant", "content": said.strip()})


def run(conversation: Conversation, lines, write, store: Store, common: dict) -> list[Record]:
    """Answers each of `lines`, through `write`; a Record for each answer, stored as it ends.

    common: fields that all records share.
    """
    records = []
    for line in lines:
        if not line.strip():
            break
        start = time.perf_counter()
        for new in conversation.answer(line.strip()):
            write(printable(new))
        seconds = time.perf_counter() - start
        write("\n")
        count = max(conversation.count, 1)
        records.append(
            Record(
                phase="decode",
                kind="measured",
                samples=(seconds / count,),
                sample_unit="s/token",
                metrics={"tokens_per_s": count / seconds, "generated_tokens": conversation.count},
                note="a whole answer, prefill and any compilation included",
                **common,
            )
        )
        store.append(records[-1])
    return records


def typed():
    """Lines of the terminal, or of a pipe."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line


def chat(args) -> None:
    """The command: load, then talk until the input ends."""
    if args.threads is not None:
        measure.limit_threads(args.threads)
    if any(name.startswith("config.") for name in args.given):
        raise UsageError("--config.FIELD makes another model; chat is for one that is stored")
    if args.source.directory is None:
        raise UsageError(
            f"--config={args.source.name} has random weights: give the path of a model"
        )
    from ternax.engine import load_stored
    from ternax.workload import first_device

    tokenizer = args.source.tokenizer()
    scheme = args.scheme if "scheme" in args.given else None
    inputs = args.inputs if "inputs" in args.given else None
    config = first_layers(args.config, args.layers)
    if processes.find(args.coordinator, args.processes, args.process, os.environ):
        raise UsageError("--mesh: one process reads what you type, and can have many devices")
    work = {"batch": 1, "context": config.max_context, "prompt": _STEP}
    model = load_stored(
        args.source,
        scheme=scheme,
        inputs=inputs,
        layers=args.layers,
        backend=args.backend,
        mesh=mesh_flag.mesh_of(args, with_scheme(config, scheme, inputs), **work),
    )
    conversation = Conversation(
        model,
        tokenizer,
        system=args.system,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    kind = (
        "its chat template"
        if tokenizer.template
        else "no chat template: lines of user: and assistant:"
    )
    print(row("ternax", f"chat with {args.source.name}, {kind}; an empty line ends it"), flush=True)
    device = measure.device_name(first_device())
    if model.layout is not None:
        device = f"{model.layout.mesh.size} x {device}"
        print(row("mesh", f"{model.layout}: {model.layout.mesh.size} devices"), flush=True)
    with open_store(args.output_dir, "chat", config.name, "") as store:
        common = dict(
            experiment="chat",
            config=config.name,
            scheme=model.config.scheme,
            inputs=model.config.inputs,
            backend=args.backend or "",
            device=device,
            layers=model.config.num_layers,
            batch=1,
            context=model.config.max_context,
            seed=args.seed,
            flags=args.command_line,
        )
        run(conversation, typed(), lambda text: print(text, end="", flush=True), store, common)
    print(f"wrote {store.directory}/results.json")


COMMAND = flags.Command(
    name="chat",
    summary="A conversation with a model in the terminal.",
    groups=(flags.model_flags, chat_flags, mesh_flag.mesh_flags, flags.run_flags),
    examples=(
        ("--config=path/to/model", "a Hugging Face directory with its tokenizer and template"),
        ("--config=model.gguf --temperature=0.7", "a GGUF file, with its own vocabulary"),
        ("--config=stdlib-bitnet", "the model that comes with ternax, which continues texts"),
    ),
    default_config="stdlib-bitnet",
)


def main(argv=None) -> int:
    return COMMAND.run(chat, argv)


if __name__ == "__main__":
    sys.exit(main())
