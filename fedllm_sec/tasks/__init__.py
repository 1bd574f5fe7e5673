"""Tasks: a model's data and metric."""

from fedllm_sec.tasks import characters as characters
from fedllm_sec.tasks import images as images
from fedllm_sec.tasks import newsgroups as newsgroups
from fedllm_sec.tasks import pubmedqa as pubmedqa
from fedllm_sec.tasks import texts as texts
from fedllm_sec.tasks.arrays import Arrays as Arrays
from fedllm_sec.tasks.arrays import ArrayTask as ArrayTask
from fedllm_sec.tasks.arrays import train_and_test as train_and_test
from fedllm_sec.tasks.task import Classification as Classification
from fedllm_sec.tasks.task import Example as Example
from fedllm_sec.tasks.task import Task as Task
from fedllm_sec.tasks.task import task as task
