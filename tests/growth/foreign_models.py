"""Models as others write them, by their habits: nothing here knows of slots.

``resnet18`` as torchvision builds it, ``mobilenet`` as timm does (both small), a recurrent classifier as tutorials do. GPT-2 and
Llama come from transformers itself, with tiny random weights.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

VOCABULARY = 40
CONTEXT = 8
CLASSES = 5


def conv3x3(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """One ReLU module, in place, for both activations; the sum is taken in place, too."""

    def __init__(self, inputs, outputs, stride=1, downsample=None):
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = downsample

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, layers, width):
        super().__init__()
        self.inplanes = width
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(width, layers[0])
        self.layer2 = self._make_layer(2 * width, layers[1], stride=2)
        self.layer3 = self._make_layer(4 * width, layers[2], stride=2)
        self.layer4 = self._make_layer(8 * width, layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * width, CLASSES)

    def _make_layer(self, planes, blocks, stride=1):
        downsample = None
        if stride != 1 or self.inplanes != planes:
            downsample = nn.Sequential(nn.Conv2d(self.inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
        made = [BasicBlock(self.inplanes, planes, stride, downsample)]
        self.inplanes = planes
        return nn.Sequential(*made, *[BasicBlock(planes, planes) for _ in range(1, blocks)])

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18():
    return ResNet([2, 2, 2, 2], width=4)


class BatchNormAct2d(nn.BatchNorm2d):
    """A norm that is its activation, too, and works in place."""

    def __init__(self, channels, act=True):
        super().__init__(channels)
        self.act = nn.Hardswish(inplace=True) if act else nn.Identity()

    def forward(self, x):
        return self.act(super().forward(x))


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, 8, 1)
        self.act1 = nn.ReLU(inplace=True)
        self.conv_expand = nn.Conv2d(8, channels, 1)
        self.gate = nn.Hardsigmoid(inplace=True)

    def forward(self, x):
        gates = self.conv_expand(self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True))))
        return x * self.gate(gates)


class InvertedResidual(nn.Module):
    def __init__(self, inputs, outputs, stride=1, expand=3):
        super().__init__()
        middle = expand * inputs
        self.has_skip = inputs == outputs and stride == 1
        self.conv_pw = nn.Conv2d(inputs, middle, 1, bias=False)
        self.bn1 = BatchNormAct2d(middle)
        self.conv_dw = nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False)
        self.bn2 = BatchNormAct2d(middle)
        self.se = SqueezeExcite(middle)
        self.conv_pwl = nn.Conv2d(middle, outputs, 1, bias=False)
        self.bn3 = BatchNormAct2d(outputs, act=False)
        self.drop_path = nn.Identity()

    def forward(self, x):
        shortcut = x
        x = self.bn2(self.conv_dw(self.bn1(self.conv_pw(x))))
        x = self.bn3(self.conv_pwl(self.se(x)))
        return self.drop_path(x) + shortcut if self.has_skip else x


class MobileNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn1 = BatchNormAct2d(8)
        self.blocks = nn.Sequential(
            nn.Sequential(InvertedResidual(8, 8)),
            nn.Sequential(InvertedResidual(8, 12, stride=2), InvertedResidual(12, 12)),
            nn.Sequential(InvertedResidual(12, 16, stride=2), InvertedResidual(16, 16), InvertedResidual(16, 16)),
        )
        self.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1))
        self.conv_head = nn.Conv2d(16, 32, 1)
        self.act2 = nn.Hardswish(inplace=True)
        self.flatten = nn.Flatten(1)
        self.classifier = nn.Linear(32, CLASSES)

    def forward(self, x):
        x = self.blocks(self.bn1(self.conv_stem(x)))
        x = self.flatten(self.act2(self.conv_head(self.global_pool(x))))
        return self.classifier(functional.dropout(x, 0.2, self.training))


def mobilenet():
    return MobileNet()


class SentimentLSTM(nn.Module):
    """Reads a sequence of tokens, answers with the class of its last step."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.lstm = nn.LSTM(6, 8, num_layers=2, batch_first=True, dropout=0.2)
        self.fc1 = nn.Linear(8, 12)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(12, CLASSES)

    def forward(self, text):
        _, (hidden, _) = self.lstm(self.embedding(text))
        return self.fc2(self.relu(self.fc1(hidden[-1])))


def recurrent():
    return SentimentLSTM()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": 12, "n_layer": 3, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2}
    tokens = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "bos_token_id": None, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens, num_key_value_heads=1))
