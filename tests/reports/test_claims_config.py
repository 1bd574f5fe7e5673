"""Claims in a configuration: what is refused, and that the papers' are there."""

from pathlib import Path

import pytest
import yaml

from fedllm_sec import InputError
from fedllm_sec.config import Config, resolve, to_yaml

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("exp0[1-7]_*.yaml"))
CLAIM = "{says: so, arm: random, share_of: benign, at_most: 0.5}"


def changed(tmp_path, claim):
    path = tmp_path / "c.yaml"
    path.write_text(f"name: c\narms: {{benign: {{}}, random: {{}}}}\nclaims: [{CLAIM}, {claim}]\n")
    return path


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ("{says: so, arm: randm, at_most: 1}", r"claims\.1: .*no arm is called randm; there are benign, random"),
        ("{says: so, arm: random, against: x, share_of: y, at_most: 1}", r"claims\.1: .*no arm is called x or y"),
        ("{says: so, arm: random}", r"claims\.1: .*set at_least or at_most"),
        ("{says: so, arm: random, at_least: 2, at_most: 1}", r"claims\.1: .*at_least <= at_most"),
        ("{says: so, arm: random, at_least: .nan}", r"claims\.1\.at_least: .*finite"),
        ("{says: so, arm: random, at_leest: 1}", r"claims\.1\.at_leest: unknown field; did you mean 'at_least'"),
        ("{says: '', arm: random, at_least: 1}", r"claims\.1\.says"),
        ("{says: so, arm: random, at_least: 1, last: 0}", r"claims\.1\.last"),
        ("3", r"claims\.1"),
    ],
)
def test_a_claim_that_cannot_be_checked_is_told_with_its_place(tmp_path, claim, message):
    with pytest.raises(InputError, match=message) as error:
        resolve(changed(tmp_path, claim), [], "laptop")
    assert all(len(line) < 300 for line in str(error.value).splitlines())


def test_faulty_arms_are_told_beside_the_claims(tmp_path):
    with pytest.raises(InputError, match=r"arms\.random\.malicous: unknown field"):
        resolve(changed(tmp_path, CLAIM), ["arms.random.malicous=3"], "laptop")


def test_claims_survive_yaml(tmp_path):
    config = resolve(changed(tmp_path, CLAIM), [], "laptop")
    assert Config.model_validate(yaml.safe_load(to_yaml(config))) == config
    assert config.claims[0].at_most == 0.5


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_experiment_of_the_papers_claims_something_about_arms_that_fit(path):
    config = resolve(path, [], "laptop")
    assert config.claims
    for claim in config.claims:
        kept = config.arms[claim.share_of]
        assert kept.attack is None
        assert not kept.defenses
        defenses = {method.name for method in config.arms[claim.arm].defenses}
        for word, name in (("m-Krum", "krum"), ("FoolsGold", "foolsgold"), ("RFA", "rfa")):
            assert (word in claim.says) == (name in defenses)
        attack = config.arms[claim.arm].attack
        for word in ("random", "zero", "flip"):
            if claim.says.startswith(word):
                assert attack.name == "byzantine"
                assert attack.parameters["mode"] == word
        assert "label flipping" not in claim.says or attack.name == "label_flipping"
        assert "nobody attacks" not in claim.says or attack is None
