"""FedGAN, FedNAS and FedGKT imported: what FedML does otherwise is told, and what cannot be imported is one line."""

import pytest

from fedllm_sec import InputError
from fedllm_sec.config import validated
from tests.fedml.test_importer_special import special


def error_of(folder, name, **train):
    with pytest.raises(InputError) as error:
        special(folder, name, **train)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "keys", "warning"),
    [
        ("FedGAN", {}, "FedGAN is FedAvg of clients with training.procedure=gan"),
        ("FedGAN", {}, "draws normal noise, twice a step, and steps the discriminator first"),
        ("FedGAN", {}, "FedML's GAN is of multilayer perceptrons"),
        ("FedGAN", {"client_optimizer": "adam"}, "client_optimizer: FedML does not read it with FedGAN"),
        ("FedGAN", {"learning_rate": 0.1}, "learning_rate: FedML does not read it with FedGAN, and takes Adam at lr"),
        ("FedGAN", {"weight_decay": 0.1}, "weight_decay: FedML does not read it with FedGAN"),
        ("FedGAN", {"momentum": 0.1}, "momentum: FedML does not read it with FedGAN"),
        ("FedGAN", {"server_lr": 0.1}, "server_lr: FedML ignores it with FedGAN"),
        ("FedNAS", {}, "FedNAS is FedAvg of clients with training.procedure=milenas"),
        ("FedNAS", {}, "searches on test examples, and steps the architecture before the weights"),
        ("FedNAS", {}, "keeps the first client's architecture"),
        ("FedNAS", {}, "grad_clip: FedML clips the architecture's gradient after its step"),
        ("FedNAS", {"epochs": 2}, "learning_rate_min: FedML's rate falls to it along a cosine"),
        ("FedNAS", {"client_optimizer": "adam"}, "client_optimizer: FedML ignores it with FedNAS"),
        ("FedNAS", {"lambda_valid_regularizer": 2}, "lambda_valid_regularizer: FedML reads it and never applies it"),
        ("FedNAS", {"client_num_per_round": 4}, "FedML's FedNAS draws nobody"),
        ("FedGKT", {}, "FedML's SGD has Nesterov's momentum of 0.9"),
        ("FedGKT", {}, "keeps its optimizers' moments from round to round"),
        ("FedGKT", {"optimizer": "Adam"}, "optimizer: FedML's Adam is that with amsgrad"),
        ("FedGKT", {"optimizer": "Adam"}, "wd: FedML does not pass it to Adam, whose weight decay is 0.0001"),
        ("FedGKT", {"alpha": 2}, "alpha: FedML weighs the server's cross-entropy with it"),
        ("FedGKT", {"whether_training_on_client": 0}, "FedML's clients keep the weights they began with"),
        ("FedGKT", {"sweep": 0, "test": True}, "epochs_server: FedML makes one epoch"),
        ("FedGKT", {"no_bn_wd": True}, "no_bn_wd: FedML then steps every second tensor only"),
        ("FedGKT", {"learning_rate": 0.1}, "learning_rate: FedML does not read it with FedGKT, and takes lr"),
        ("FedGKT", {"client_optimizer": "sgd"}, "client_optimizer: FedML does not read it with FedGKT"),
        ("FedGKT", {"weight_decay": 0.1}, "weight_decay: FedML does not read it with FedGKT, and takes wd"),
        ("FedGKT", {"epochs": 9}, "epochs: FedML does not read it with FedGKT, and takes epochs_client"),
        ("FedGKT", {"momentum": 0.1}, "momentum: FedML does not read it with FedGKT, and takes 0.9"),
        ("FedGKT", {"server_momentum": 0.9}, "server_momentum: FedML ignores it with FedGKT"),
        ("FedGKT", {"client_num_per_round": 4}, "FedML's FedGKT draws nobody"),
    ],
)
def test_what_fedml_does_otherwise(tmp_path, name, keys, warning):
    _, warnings = special(tmp_path, name, **keys)
    assert sum(warning in given for given in warnings) == 1, warnings


@pytest.mark.parametrize(
    ("name", "quiet"),
    [("FedNAS", ["learning_rate_min", "lambda_", "stage"]), ("FedGKT", ["alpha", "draws nobody", "no_bn_wd", "sweep"])],
)
def test_what_is_the_same_is_not_told(tmp_path, name, quiet):
    _, warnings = special(tmp_path, name)
    assert not [warning for warning in warnings if any(word in warning for word in quiet)]


NEEDED = {
    "FedNAS": ["stage", "layers", "init_channels", "arch_learning_rate", "arch_weight_decay", "learning_rate",
               "momentum", "weight_decay", "lambda_train_regularizer"],
    "FedGKT": ["lr", "optimizer", "wd", "epochs_client", "epochs_server", "alpha", "temperature",
               "whether_distill_on_the_server", "whether_training_on_client"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in NEEDED.items() for key in keys])
def test_a_key_that_fedml_crashes_without_is_told(tmp_path, name, key):
    config, warnings = special(tmp_path, name, **{key: ...})
    assert sum(f"{key}: is missing: FedML crashes; here it is " in warning for warning in warnings) == 1
    validated(config, "imported")


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("FedGAN", {"lr": ...}, "lr is missing: FedGAN's learning rate"),
        ("FedGAN", {"lr": 0}, "train_args.lr: should be a number greater than 0, got 0"),
        ("FedGAN", {"model": "resnet20"}, "model: FedGAN does not go with resnet20: set model: GAN"),
        ("FedNAS", {"model": "gan"}, "model: FedNAS does not go with gan: set model: darts"),
        ("FedGKT", {"model": "cnn"}, "FedGKT does not go with cnn: set model: resnet20 or resnet56 or resnet56_gkt"),
        ("FedGKT", {"model": "resnet57"}, "unknown 'resnet57'"),
        ("FedNAS", {"stage": "train"}, "stage: train is an experiment of its own here"),
        ("FedNAS", {"stage": "Train"}, "scripts/derive_architecture.py, and train model.name=darts_network"),
        ("FedNAS", {"stage": "serch"}, "stage: unknown 'serch'; did you mean 'search'"),
        ("FedNAS", {"layers": 2}, "layers: 2, but two layers halve the image; use 3 or more"),
        ("FedNAS", {"init_channels": 0}, "init_channels: should be a whole number, 1 or more"),
        ("FedNAS", {"lambda_train_regularizer": 0}, "lambda_train_regularizer: 0 leaves the training loss out"),
        ("FedNAS", {"lambda_train_regularizer": -1}, "should be a number, not negative, got -1"),
        ("FedNAS", {"arch_learning_rate": 0}, "arch_learning_rate: should be a number greater than 0"),
        ("FedNAS", {"momentum": 1.5}, "training.momentum"),
        ("FedGKT", {"alpha": 0}, "alpha: 0, but without labels FedGKT's server learns no classes"),
        ("FedGKT", {"alpha": -1}, "alpha: should be a number, not negative"),
        ("FedGKT", {"temperature": 0}, "temperature: should be a number greater than 0"),
        ("FedGKT", {"optimizer": "AdamW"}, "optimizer: unknown 'AdamW'; did you mean 'Adam'"),
        ("FedGKT", {"epochs_server": 0}, "epochs_server: should be a whole number, 1 or more"),
        ("FedGKT", {"epochs_client": 0.5}, "epochs_client: should be a whole number"),
        ("FedGKT", {"whether_training_on_client": "no"}, "should be true or false, without quotes"),
        ("FedGKT", {"lr": "fast"}, "lr: should be a number, got 'fast'"),
    ],
)
def test_what_cannot_be_imported_is_one_line(tmp_path, name, keys, message):
    assert message in error_of(tmp_path, name, **keys)
