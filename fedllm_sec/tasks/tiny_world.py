"""A closed, invented biomedical world that speaks in PubMedQA's form.

Every study of this world compares one treatment (or exposure) with a control on one asked outcome, and its
results section settles the question: a significant difference is a *yes*, no difference is a *no*, a trend or an
effect confined to a subgroup is a *maybe*. Some studies also report a second outcome that nobody asked about, so
the answer has to be read from the right sentence. Treatments are invented names; nothing here is medical fact.

`records` gives labelled rows for fine-tuning and testing, `articles` gives unlabelled prose of the same
world (in other wording than any fine-tuning prompt) for pre-training the tiny base model.
"""

from dataclasses import dataclass
from random import Random
from typing import Any


def _list(text: str) -> list[str]:
    return text.split(", ")


VERDICT_WEIGHTS = {"yes": 0.55, "no": 0.34, "maybe": 0.11}
ASIDE_SHARE = 0.35  # of studies that also report an outcome the question does not ask about

NAME_HEADS = ["vel", "tor", "cam", "bri", "nol", "sar", "dex", "lum", "pra", "zen", "mor", "fil", "gal", "hex"]
NAME_TAILS = ["orine", "astat", "imab", "oxil", "adine", "etol", "upril", "avir", "azole", "icin"]
PROGRAMMES = _list(
    "group exercise, sleep training, early feeding, home nursing, music therapy, light therapy, telephone advice, "
    "breathing practice, a low salt diet, a high fibre diet, cold therapy, massage"
)
EXPOSURES = _list(
    "night work, daily coffee, pet ownership, city noise, vitamin deficiency, mould at home, early retirement, living "
    "alone, passive smoking, a family history, low iron, irregular meals"
)
OUTCOMES_TO_LOWER = _list(
    "pain scores, relapse rates, hospital stays, glucose levels, blood pressures, infection rates, fatigue scores, "
    "anxiety scores, seizure counts, wound sizes, fracture rates, readmission rates, fever days, liver enzymes, itch "
    "scores, fall rates"
)
OUTCOMES_TO_RAISE = _list(
    "walking distances, survival times, lung volumes, platelet counts, memory scores, sleep hours, bone densities, "
    "grip strengths, birth weights, mood scores, healing rates, iron stores"
)
CONDITIONS = _list(
    "asthma, diabetes, epilepsy, migraine, anaemia, arthritis, eczema, depression, hepatitis, heart failure, kidney "
    "disease, chronic cough, sepsis, psoriasis, obesity, insomnia, gout, stroke, pneumonia, back injury"
)
PATIENTS = _list(
    "adults, children, older women, older men, pregnant women, veterans, athletes, nurses, teenagers, newborns, farm "
    "workers, students"
)
SUBGROUPS = _list("smokers, the youngest, the oldest, severe cases, mild cases, women, men, newcomers")
PLACES = _list("a city hospital, two rural clinics, a teaching hospital, a care home, six centres, a registry")
TIMES = _list("six weeks, three months, one year, two years, ten days, one month")
CONTROLS = {True: ["placebo", "usual care", "no treatment"], False: ["no exposure", "none"]}

VERBS = {False: ["reduce", "lower", "decrease"], True: ["improve", "raise", "increase"]}
MOVES = {False: ["fell", "dropped", "declined"], True: ["rose", "climbed", "grew"]}

QUESTIONS = {
    True: [
        "Does {t} {verb} {o} in {who} with {c}?",
        "Can {t} {verb} {o} among {who} with {c}?",
        "Are {o} {comp} with {t} in {who} with {c}?",
    ],
    False: [
        "Is {t} linked to {comp} {o} in {who} with {c}?",
        "Does {t} go with {comp} {o} among {who} with {c}?",
        "Are {o} {comp} with {t} in {who} with {c}?",
    ],
}
BACKGROUNDS = [
    "Whether {t} changes {o} in {who} with {c} is debated.",
    "Small reports have connected {t} with {comp} {o}, but evidence in {c} is thin.",
    "In {c}, {o} are a daily concern for {who}, and {t} has drawn interest.",
    "Opinions on {t} for {who} with {c} are divided, above all about {o}.",
]
METHODS = [
    "We followed {n} {who} from {place} for {time} and compared {t} with {ctl}.",
    "A total of {n} {who} with {c} from {place} were studied over {time}.",
    "Records of {n} {who} with {c} were drawn from {place}; {t} was set against {ctl}.",
    "In {place}, {n} {who} had {o} measured after {time} with {t} or {ctl}.",
]
FINDINGS = {
    "yes": [
        "With {t}, {o} were significantly {comp} than with {ctl} (p = {p}).",
        "After {time}, {o} {moved} by {pct} percent with {t} and held steady with {ctl} (p = {p}).",
        "The groups clearly differed in {o}, which were {comp} with {t} (p = {p}).",
        "Compared with {ctl}, {t} went with markedly {comp} {o} at {time}.",
    ],
    "no": [
        "With {t}, {o} were much the same as with {ctl} (p = {p}).",
        "After {time}, {o} had not changed with {t} any more than with {ctl} (p = {p}).",
        "The groups did not differ in {o}, whether with {t} or {ctl} (p = {p}).",
        "Compared with {ctl}, {t} made no difference to {o} at {time}.",
    ],
    "maybe": [
        "With {t}, {o} tended to be {comp} than with {ctl}, short of significance (p = {p}).",
        "After {time}, {o} {moved} with {t} only in {sub}, not in the rest.",
        "The groups differed in {o} among {sub} alone, being {comp} with {t}.",
        "Compared with {ctl}, {t} went with {comp} {o} at first, but not at {time}.",
    ],
}
P_VALUES = {
    "yes": ["0.001", "0.004", "0.01", "0.02", "0.03"],
    "no": ["0.34", "0.48", "0.57", "0.66", "0.81"],
    "maybe": ["0.06", "0.07", "0.08", "0.09"],
}
CONCLUSIONS = {
    "yes": [
        "In {who} with {c}, {t} was followed by {comp} {o}.",
        "Our results show {comp} {o} with {t} in {who} with {c}.",
    ],
    "no": [
        "In {who} with {c}, {t} had no effect on {o}.",
        "Our results show no change of {o} with {t} in {who} with {c}.",
    ],
    "maybe": [
        "In {who} with {c}, {t} may affect {o}, but more studies are needed.",
        "Our results leave open whether {t} changes {o} in {who} with {c}.",
    ],
}
ARTICLE_FORMS = [
    "{abstract} {conclusion}",
    "{abstract} {conclusion}",
    "{abstract} A reader wrote in: {question} The editor replied {verdict}. {conclusion}",
    "{abstract} At the journal club someone asked, {question} The short reply was {verdict}. {conclusion}",
    "From the ward notebook. {results} So, {question} I would say {verdict}. {conclusion}",
    "Quiz night. {results} {question} Those who said {verdict} took the point. {conclusion}",
    "{question} We now think {verdict}. {results} {conclusion}",
]


@dataclass(frozen=True)
class Study:
    """One invented study: its prose in parts, and the verdict they lead to."""

    background: str
    methods: str
    results: str
    question: str
    conclusion: str
    verdict: str


def _facts(rng: Random, verdict: str) -> dict[str, str]:
    """Draw the words that fill a study's templates."""
    is_treatment = rng.random() < 0.75
    upward = rng.random() < 0.45
    if not is_treatment:
        treatment = rng.choice(EXPOSURES)
    elif rng.random() < 0.65:
        treatment = rng.choice(NAME_HEADS) + rng.choice(NAME_TAILS)
    else:
        treatment = rng.choice(PROGRAMMES)
    return {
        "kind": "treatment" if is_treatment else "exposure",
        "t": treatment,
        "o": rng.choice(OUTCOMES_TO_RAISE if upward else OUTCOMES_TO_LOWER),
        "comp": "higher" if upward else "lower",
        "verb": rng.choice(VERBS[upward]),
        "moved": rng.choice(MOVES[upward]),
        "who": rng.choice(PATIENTS),
        "c": rng.choice(CONDITIONS),
        "ctl": rng.choice(CONTROLS[is_treatment]),
        "place": rng.choice(PLACES),
        "time": rng.choice(TIMES),
        "sub": rng.choice(SUBGROUPS),
        "n": str(10 * rng.randint(4, 60)),
        "pct": str(5 * rng.randint(3, 9)),
        "p": rng.choice(P_VALUES[verdict]),
    }


def _draw_verdict(rng: Random) -> str:
    return rng.choices(list(VERDICT_WEIGHTS), weights=list(VERDICT_WEIGHTS.values()))[0]


def _aside(rng: Random, facts: dict[str, str]) -> str:
    """A finding of the same study on some other outcome, with a verdict of its own."""
    verdict = _draw_verdict(rng)
    other = _facts(rng, verdict)
    while other["o"] == facts["o"]:
        other = _facts(rng, verdict)
    shared = {key: facts[key] for key in ("t", "who", "c", "ctl", "place")}
    return rng.choice(FINDINGS[verdict]).format_map(other | shared)


def _study(rng: Random) -> Study:
    """Draw one study."""
    verdict = _draw_verdict(rng)
    facts = _facts(rng, verdict)
    findings = [rng.choice(FINDINGS[verdict]).format_map(facts)]
    if rng.random() < ASIDE_SHARE:
        findings.insert(rng.randint(0, 1), _aside(rng, facts))
    return Study(
        background=rng.choice(BACKGROUNDS).format_map(facts),
        methods=rng.choice(METHODS).format_map(facts),
        results=" ".join(findings),
        question=rng.choice(QUESTIONS[facts["kind"] == "treatment"]).format_map(facts),
        conclusion=rng.choice(CONCLUSIONS[verdict]).format_map(facts),
        verdict=verdict,
    )


def records(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Return `count` labelled rows in PubMedQA's form, the same ones for the same seed."""
    rng = Random(f"records {seed}")
    rows = []
    for index in range(count):
        study = _study(rng)
        rows.append(
            {
                "pubid": 900_000_000 + 100_000 * (seed % 1_000) + index,
                "question": study.question,
                "contexts": [study.background, study.methods, study.results],
                "long_answer": study.conclusion,
                "final_decision": study.verdict,
            }
        )
    return rows


def articles(count: int, *, seed: int) -> list[str]:
    """Return `count` plain texts about studies of this world, for pre-training."""
    rng = Random(f"articles {seed}")
    texts = []
    for _ in range(count):
        study = _study(rng)
        abstract = f"{study.background} {study.methods} {study.results}"
        texts.append(rng.choice(ARTICLE_FORMS).format(abstract=abstract, **vars(study)))
    return texts
