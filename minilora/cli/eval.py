"""minilora eval: loss and perplexity on a file of rows."""

from typing import Unpack

from ..config import DataConfig
from ..terminal import say
from .shared_flags import Adapter, Data, Int8, Json, Model, Opening, Quant, check_paths


def run(
    *,
    model: Model,
    adapter: Adapter | None = None,
    quant: Quant = "keep",
    int8: Int8 = False,
    data: Data,
    settings: DataConfig,
    json: Json = False,
    **opening: Unpack[Opening],
) -> None:
    check_paths(model, adapter, data, settings.encoding)
    say(f"eval        {model} on {data}", quiet=json)
    from json import dumps

    from ..checkpoint.open_model import folder_notes, open_model, round_to_int8
    from ..data import load_examples
    from ..evaluate import evaluate
    from ..files.model_folder import ModelFolder
    from ..text.tokenizer import load_tokenizer

    folder = ModelFolder(model)
    tokenizer = load_tokenizer(folder, adapter)
    for name, note in folder_notes(folder, tokenizer, adapter).items():
        say(f"{name:<12}{note}", quiet=json)
    examples, report = load_examples(data, tokenizer, settings)
    decoder = open_model(
        folder, tokenizer, adapter, quant=quant, say=lambda how: say(f"compute     {how}", quiet=json), **opening
    )
    score, rounded = evaluate(decoder, examples, settings.max_length), None
    if int8:
        round_to_int8(decoder)
        rounded = evaluate(decoder, examples, settings.max_length)
    if json:
        found = {"loss": score.loss, "perplexity": score.perplexity, "tokens": score.tokens, "rows": len(examples)}
        say(dumps(found | ({} if rounded is None else {"int8_loss": rounded.loss})))
        return
    say(f"data        {report}")
    say(f"loss        {score.loss:.4f} nats a token over {score.tokens:,} answer tokens")
    say(f"perplexity  {score.perplexity:.3f}")
    if rounded is not None:
        more = 100 * (rounded.loss / score.loss - 1)
        say(f"int8        loss {rounded.loss:.4f} ({more:+.2f} %), perplexity {rounded.perplexity:.3f}")
