"""Made-up tweets and posts in the form of Sentiment140 and 20 Newsgroups, for runs without a network.

A tweet has two or three words of feeling, one of which may be of the other sign; a post is on one of 20 subjects, a
third of whose words tell the subject. Both can be learned, neither is trivial, and nothing is taken from the real sets.
"""

from random import Random
from typing import NamedTuple


def words(text: str) -> list[str]:
    """A list that is easy to read."""
    return text.split()


AUTHORS, TWEETS_OF_AN_AUTHOR = 40, {"train": 40, "test": 10}
POSTS_OF_A_SUBJECT = {"train": 60, "test": 15}
POST_WORDS = 40
SUBJECT_SHARE = 0.3
OTHER_FEELING = 0.15  # the chance that a word of feeling is of the other sign
FEELINGS = (
    words("awful terrible sad tired broken lost sick horrible ruined lonely late cold boring painful worse angry"),
    words("great lovely happy fresh sunny fun sweet brilliant perfect kind warm excited proud better calm glad"),
)
THINGS = words(
    "breakfast homework train weather concert phone exam garden dentist holiday match coffee flat laptop birthday "
    "traffic film neighbour haircut meeting dog bicycle"
)
OPENINGS = words("today my the another this our that")
FILLERS = words("really so was feels with after again just now but and very it is")
SUBJECTS = [
    words(text)
    for text in (
        "belief doubt proof morals reason sceptic myth creed",
        "pixel render palette polygon shader bitmap contour vector",
        "desktop driver icon wallpaper installer shortcut window registry",
        "motherboard floppy controller cable jumper bios drive socket",
        "powerbook trackball toolbox firmware launcher appletalk system quadra",
        "widget server client toolkit display callback colormap pixmap",
        "offer shipping price sale condition cheque buyer bargain",
        "engine brake gearbox tyre clutch mileage sedan dealer",
        "helmet rider motorbike throttle saddle chain visor commute",
        "pitcher inning homer catcher bullpen bunt umpire dugout",
        "puck goalie rink playoff slapshot defenceman overtime penalty",
        "cipher key encryption plaintext escrow wiretap prime signature",
        "resistor voltage circuit capacitor amplifier solder diode relay",
        "patient dose symptom diet infection doctor allergy treatment",
        "orbit satellite launch lunar probe shuttle telescope payload",
        "parish scripture prayer gospel sermon hymn bishop grace",
        "rifle permit holster ammunition hunter barrel trigger range",
        "treaty border village ceasefire ministry refugee embassy province",
        "senate ballot budget tax reform voter cabinet policy",
        "meditation prophet ritual cult pilgrimage temple doctrine afterlife",
    )
]
COMMON = words(
    "the a of and to in that it is was for on with as be at by this have from or one had but what all were when we "
    "there can an your which their if do will each about how up out them then many some so these would other into has "
    "more two like time could make than first people way find use work"
)


class Tweets(NamedTuple):
    """Texts with their sentiments (0 negative, 1 positive) and authors."""

    texts: list[str]
    labels: list[int]
    users: tuple[str, ...]


class Posts(NamedTuple):
    """Texts with their subjects, 0 to 19."""

    texts: list[str]
    labels: list[int]


def tweets(split: str) -> Tweets:
    """40 authors' tweets, the same ones every time; an author is cheerful to a degree of his own."""
    texts, labels, users = [], [], []
    for author in range(AUTHORS):
        cheer = Random(f"author {author}").uniform(0.2, 0.8)
        rng = Random(f"tweets {split} {author}")
        for _ in range(TWEETS_OF_AN_AUTHOR[split]):
            label = int(rng.random() < cheer)
            said = [rng.choice(OPENINGS), rng.choice(THINGS)]
            for _ in range(rng.randint(2, 3)):
                said += [rng.choice(FILLERS), rng.choice(FEELINGS[label ^ (rng.random() < OTHER_FEELING)])]
            texts.append(" ".join(said))
            labels.append(label)
            users.append(f"author_{author:02d}")
    return Tweets(texts, labels, tuple(users))


def news(split: str, of_each: int | None = None) -> Posts:
    """Posts on 20 subjects, the same ones every time, subject by subject in turn.

    Args:
        split: `train`, `test`, or another name for other posts.
        of_each: how many posts of each subject; default: those of the split.
    """
    rng = Random(f"news {split}")
    texts, labels = [], []
    for _ in range(of_each or POSTS_OF_A_SUBJECT[split]):
        for label, subject in enumerate(SUBJECTS):
            said = [rng.choice(subject if rng.random() < SUBJECT_SHARE else COMMON) for _ in range(POST_WORDS)]
            texts.append(" ".join(said))
            labels.append(label)
    return Posts(texts, labels)
