"""minilora eval: loss and perplexity on a file of rows."""

from typing import Unpack

from ..config import RANK_TIMEOUT, DataConfig
from ..ranks.start import run_on, several
from ..terminal import say
from .shared_flags import Adapter, Data, GPUs, Int8, Json, Model, Opening, Quant, RankTimeout, check_paths


def run(
    *,
    model: Model,
    adapter: Adapter | None = None,
    quant: Quant = "keep",
    int8: Int8 = False,
    data: Data,
    settings: DataConfig,
    json: Json = False,
    gpus: GPUs = 1,
    rank_timeout: RankTimeout = RANK_TIMEOUT,
    **opening: Unpack[Opening],
) -> int:
    check_paths(model, adapter, data, settings.encoding)
    if several(gpus):
        return run_on(gpus)
    say(f"eval        {model} on {data}", quiet=json)
    from json import dumps

    from ..checkpoint.open_model import folder_notes, open_model, round_to_int8
    from ..data import load_examples
    from ..evaluate import evaluate
    from ..files.model_folder import ModelFolder
    from ..positions import check_room
    from ..ranks.ranks import join
    from ..text.tokenizer import load_tokenizer

    ranks = join(rank_timeout)
    with ranks.ending_as_one("Start it again."):
        folder = ModelFolder(model)
        tokenizer = load_tokenizer(folder, adapter)
        for name, note in folder_notes(folder, tokenizer, adapter).items():
            say(f"{name:<12}{note}", quiet=json)
        examples, report = load_examples(data, tokenizer, settings)
        decoder = open_model(
            folder,
            tokenizer,
            adapter,
            quant=quant,
            say=lambda how: say(f"compute     {how}", quiet=json),
            ranks=ranks,
            **opening,
        )
        check_room(decoder, f"the longest row of {data}", examples.longest)
        score, rounded = evaluate(decoder, examples, settings.max_length, ranks), None
        if int8:
            round_to_int8(decoder)
            rounded = evaluate(decoder, examples, settings.max_length, ranks)
    if json:
        found = {"loss": score.loss, "perplexity": score.perplexity, "tokens": score.tokens, "rows": len(examples)}
        found |= {"left_out": report.rows - report.kept}
        say(dumps(found | ({} if rounded is None else {"int8_loss": rounded.loss})), whole=True)
        return 0
    say(f"data        {report}")
    say(f"loss        {score.loss:.4f} nats a token over {score.tokens:,} answer tokens")
    say(f"perplexity  {score.perplexity:.3f}")
    if rounded is not None:
        more = 100 * (rounded.loss / score.loss - 1)
        say(f"int8        loss {rounded.loss:.4f} ({more:+.2f} %), perplexity {rounded.perplexity:.3f}")
    return 0
