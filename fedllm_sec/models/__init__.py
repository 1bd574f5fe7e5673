"""Small models by name; a builder makes one for the shape of a task."""

from fedllm_sec.models import convolutional as convolutional
from fedllm_sec.models import generative as generative
from fedllm_sec.models import genotype as genotype
from fedllm_sec.models import linear as linear
from fedllm_sec.models import recurrent as recurrent
from fedllm_sec.models import residual as residual
from fedllm_sec.models import search as search
from fedllm_sec.models.generative import DCGAN as DCGAN
from fedllm_sec.models.model import Builder as Builder
from fedllm_sec.models.model import Shape as Shape
from fedllm_sec.models.model import model as model
