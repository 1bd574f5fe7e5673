"""Tasks: a model's data and metric."""

from fedllm_sec.tasks import pubmedqa as pubmedqa
from fedllm_sec.tasks.task import Example as Example
from fedllm_sec.tasks.task import Task as Task
from fedllm_sec.tasks.task import task as task
