"""hh-rlhf: two conversations that part at the assistant's last turn, the preferred one first."""

from equipoise.data.config import DataConfig
from equipoise.data.errors import DataError
from equipoise.data.records import Records
from equipoise.data.schema import HELPFUL, PreferencePair
from equipoise.data.sources.hub import TEXT, HubSet, read_rows
from equipoise.data.taxonomy import OTHER
from equipoise.data.transcripts import parse_transcript, split_transcript


def _files(*folders: str) -> HubSet:
    return HubSet(
        repo="Anthropic/hh-rlhf",
        revision="09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa",
        files=tuple(f"{folder}/train.jsonl.gz" for folder in folders),
        columns={"chosen": TEXT, "rejected": TEXT},
    )


VERSIONS = {
    "harmless": _files("harmless-base"),
    "helpful": _files("helpful-base"),
    "helpful-online": _files("helpful-online"),
    "helpful-rejection-sampled": _files("helpful-rejection-sampled"),
}


def load(version: str, config: DataConfig) -> Records:
    """Pairs of the whole conversation but the last answer, and the two last answers.

    The set has no harm categories: harmless pairs are `OTHER`, helpful ones `helpful`. Nobody judged the answers'
    safety, only which one is preferred.
    """
    records = Records()
    for number, row in enumerate(read_rows(VERSIONS[version], config.mirror, config.num_rows), start=1):
        records.num_read = number
        try:
            prompt, chosen = split_transcript(row["chosen"] or "")
            other_prompt, rejected = split_transcript(row["rejected"] or "")
            turns = parse_transcript(prompt)
        except DataError:
            records.left_out["the transcript has an empty turn or no speakers"] += 1
            continue
        if prompt != other_prompt:
            records.left_out["the conversations part before the last answer"] += 1
        elif not chosen or not rejected:
            records.left_out["an answer is empty"] += 1
        elif chosen == rejected:
            records.left_out["both answers are the same"] += 1
        elif turns[-1]["role"] != "user":
            records.left_out["the assistant speaks twice in a row"] += 1
        else:
            records.pairs.append(
                PreferencePair(
                    id=f"hh_rlhf/{version}:{number}",
                    prompt=turns,
                    chosen=chosen,
                    rejected=rejected,
                    category=OTHER if version == "harmless" else HELPFUL,
                    source=f"hh-rlhf {version}",
                )
            )
    return records
