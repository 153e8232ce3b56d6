"""Stage 2: find the sites. Read-only: looks at a normalised graph, returns what it saw.

    upsample -> pad -> conv -> norm -> relu -> add  =>  Match("upsample+pad+conv+norm+relu+add")

A chain is followed only through tensors with a single reader; it ends where another reader needs
the tensor, or where a barrier lies between a step and the next, and the step that could not be taken
is reported with that reason. Once every convolution has its chain, an upsampling or a pad that is left over
and alone reads what a site finishes is the site's last step: one op writes what it moves.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from sf_compile.graph import crops, patterns, safety, spelling
from sf_compile.graph.norm_patterns import NORMS
from sf_compile.graph.normalize import NormalizedGraph
from sf_compile.graph.sites import Match, Matches
from sf_compile.graph.steps import Activate, Conv, ConvTranspose, Norm, Pad, Step, Upsample
from sf_compile.graph.values import Miss, dense, value_of

log = logging.getLogger(__name__)

# What a norm or a convolution can be followed by.
_ENDS = spelling.ACTIVATIONS | {spelling.ADD}
# Operations, in any mode, that networks which make pictures have.
_LARGER = frozenset({spelling.INTERPOLATE, spelling.CONV_TRANSPOSE2D, torch.pixel_shuffle})
# Dtypes of the fused convolutions' kernels, which apply an activation as they write.
_WITH_EPILOGUE = (torch.float16, torch.bfloat16)
# What a scale or an offset stays below: within float32.
_LARGEST = 2.0**127


def match(graph: NormalizedGraph) -> Matches:
    """Find every site of ``graph``; no node belongs to two."""
    finder = _Finder(graph)
    for node in graph.graph.nodes:
        if finder.operation(node) in patterns.CONVOLUTIONS:
            finder.visit(node, patterns.CONVOLUTIONS[node.target])
    for node in graph.graph.nodes:
        if finder.operation(node) in NORMS and node not in finder.taken:
            finder.visit(node, NORMS[node.target])
    # A norm without a convolution in front of it may be finished by one that has nothing else around it.
    for node in graph.graph.nodes:
        if finder.operation(node) in patterns.CONVOLUTIONS and node not in finder.taken:
            finder.visit(node, patterns.CONVOLUTIONS[node.target])
    finder.extend()
    finder.leave_plain_networks()
    sites = sorted(finder.sites, key=lambda site: finder.order[site.anchor])
    finder.report_leftovers()
    taken = {node.name for node in finder.taken}
    misses = tuple(miss for miss in finder.misses.values() if miss.node not in taken)
    for site in sites:
        log.debug("match: %s", site)
    for miss in misses:
        log.debug("left alone: %s: %s", miss.node, miss.reason)
    return Matches(tuple(sites), misses)


class _Finder:
    def __init__(self, graph: NormalizedGraph) -> None:
        self.graph = graph
        self.order = {node: i for i, node in enumerate(graph.graph.nodes)}
        self.taken: set[fx.Node] = set()
        self.sites: list[Match] = []
        self.misses: dict[str, Miss] = {miss.node: miss for miss in graph.misses}
        self.transform = safety.transform(graph.graph)

    def miss(self, miss: Miss) -> None:
        """Keep the first reason given for a node."""
        self.misses.setdefault(miss.node, miss)

    def operation(self, node: fx.Node) -> Any:
        """The target of a node in canonical form; None for any other."""
        return node.target if node in self.graph.canonical else None

    def visit(self, node: fx.Node, rule: Any) -> None:
        """Grow a site around ``node``, and take it if it may and should be fused."""
        step = rule(node)
        if isinstance(step, Miss):
            self.miss(step)
            return
        site = self.forward(Match(norm=step)) if isinstance(step, Norm) else self.around(step)
        reason = self.refusal(site)
        if reason is not None:
            self.miss(Miss(node.name, reason))
            return
        self.sites.append(site)
        self.taken.update(step.node for step in site.steps)

    def leave_plain_networks(self) -> None:
        """Fuse nothing where every site is plain: eager's passes are as few, and its results stay its own.

        A network without norms that upsamples makes pictures, and is no classifier.
        """
        makes_pictures = all(site.norm is None for site in self.sites) and self.upsamples
        if all(site.is_plain for site in self.sites) and not makes_pictures:
            reason = "convolutions and batch norms in a graph of no other sites"
            for site in self.sites:
                self.miss(Miss(site.anchor.name, reason))
            self.sites.clear()
            self.taken.clear()

    @property
    def upsamples(self) -> bool:
        """Whether anything in the graph makes pictures larger."""
        return any(node.target in _LARGER for node in self.graph.graph.nodes)

    def around(self, conv: Conv) -> Match:
        """The site of a convolution: backwards through pad and upsample, then forwards."""
        site = Match(conv=conv)
        input = conv.input
        if isinstance(conv, ConvTranspose):  # what pads its input is no padding of its own
            return self.forward(self.cropped(site))
        if self.operation(input) is spelling.PAD and self.joins(input, conv.node):
            pad = patterns.pad(input)
            if isinstance(pad, Miss):
                self.miss(pad)
            elif any(conv.padding) and any(pad.padding) and pad.mode != "zeros":
                self.miss(Miss(input.name, f"{pad.mode} padding in front of the convolution's own zeros"))
            else:
                site, input = replace(site, pad=pad), pad.input
        if self.operation(input) is spelling.INTERPOLATE and self.joins(input, site.steps[0].node):
            upsample = patterns.upsample(input)
            if isinstance(upsample, Miss):
                self.miss(upsample)
            else:
                site, input = replace(site, upsample=upsample), upsample.input
        if self.operation(input) in spelling.ACTIVATIONS and not self.ends_another(input):
            before = patterns.activation(input)
            joins = isinstance(before, Activate) and before.slope is None
            if isinstance(before, Activate) and joins and self.joins(input, site.steps[0].node):
                site = replace(site, before=before)
        return self.forward(site)

    def ends_another(self, activation: fx.Node) -> bool:
        """Whether ``activation`` is part of a site in front of it: of one found, or of a norm's."""
        producer = activation.all_input_nodes[0]
        if activation in self.taken or self.operation(producer) not in NORMS:
            return activation in self.taken
        return len(producer.users) == 1 and isinstance(NORMS[producer.target](producer), Norm)

    def cropped(self, site: Match) -> Match:
        """``site`` with the crops between its convolution and a norm: an instance norm of what is left."""
        end = site
        while (node := self.next(end)) is not None and self.operation(node) in crops.CROPS:
            crop = crops.crop(node)
            if isinstance(crop, Miss):
                return site
            end = replace(end, crops=(*end.crops, crop))
        if node is None or self.operation(node) not in NORMS:
            return site
        return end if isinstance(NORMS[node.target](node), Norm) else site

    def extend(self) -> None:
        """Give each site that has a finish what moves it: the upsampling and pad that alone read it."""
        self.sites = [self.moved(site) for site in self.sites]
        for site in self.sites:
            self.taken.update(step.node for step in site.steps)

    def moved(self, site: Match) -> Match:
        """``site`` with the upsampling and the pad behind it that no other site has."""
        if site.norm is None and site.add is None:
            return site
        node = self.next(site)
        if node is not None and self.operation(node) is spelling.INTERPOLATE and node not in self.taken:
            upsample = patterns.upsample(node)
            if isinstance(upsample, Upsample):
                site = replace(site, upsample_after=upsample)
                node = self.next(site)
        if node is not None and self.operation(node) is spelling.PAD and node not in self.taken:
            pad = patterns.pad(node)
            if isinstance(pad, Pad):
                site = replace(site, pad_after=pad)
        return site

    def forward(self, site: Match) -> Match:
        """Follow the chain from the site's end: norm, then activation, then affine maps, then add."""
        node = self.next(site)
        if node is not None and site.norm is None and self.operation(node) in NORMS:
            norm = NORMS[node.target](node)
            if isinstance(norm, Miss):
                self.miss(norm)
                return site
            site = replace(site, norm=norm)
            node = self.next(site)
        if node is not None and self.operation(node) in spelling.ACTIVATIONS and node not in self.taken:
            activation = patterns.activation(node)
            if isinstance(activation, Miss):
                self.miss(activation)
                return site
            if activation.slope is not None and site.norm is None:
                self.miss(Miss(node.name, "a PReLU that follows no norm"))
                return site
            site = replace(site, activation=activation)
            node = self.next(site)
        while node is not None and self.operation(node) in spelling.WITH_NUMBER:
            affine = patterns.affine(node)
            if isinstance(affine, Miss):
                self.miss(affine)
                return site
            longer = replace(site, affines=(*site.affines, affine))
            if max(abs(longer.function.scale), abs(longer.function.offset)) >= _LARGEST:
                return site
            site, node = longer, self.next(longer)
        if node is not None and self.operation(node) is spelling.ADD and node not in self.taken:
            add = patterns.add(node, site.output)
            if isinstance(add, Miss):
                self.miss(add)
            elif self.available(add.residual, site):
                site = replace(site, add=add)
        return site

    def next(self, site: Match) -> fx.Node | None:
        """The only reader of the site's output; None if there is none, or a barrier lies before it."""
        readers = list(site.output.users)
        if len(readers) != 1:
            return None
        barrier = self.barrier(site.output, readers[0])
        if barrier is not None and self.operation(readers[0]) in _ENDS:
            self.miss(Miss(readers[0].name, barrier))
        return readers[0] if barrier is None else None

    def available(self, residual: fx.Node, site: Match) -> bool:
        """Whether ``residual`` is there without the site having run (it may be another site's output)."""
        return residual not in {step.node for step in site.steps}

    def joins(self, node: fx.Node, reader: fx.Node) -> bool:
        """Whether ``reader`` alone reads ``node``, and no barrier lies between; if not, say why."""
        if (barrier := self.barrier(node, reader)) is not None:
            self.miss(Miss(node.name, barrier))
            return False
        others = [user.name for user in node.users if user is not reader]
        if others or node in self.taken:
            self.miss(Miss(node.name, f"also read by {', '.join(others) or 'another site'}"))
            return False
        return True

    def refusal(self, site: Match) -> str | None:
        """Why a well-formed site must not, or need not, be fused; None if it should be."""
        if self.transform is not None:
            return f"a torch.func transform in the graph ({self.transform}): the ops have no rule for it"
        padding = site.pad is not None and any(site.pad.padding)
        bare = site.norm is None and site.upsample is None and not padding
        if bare and not self.finishes(site.input) and not self.ends_in_a_kernel(site):
            return "a convolution with nothing around it that fusion saves"
        if site.conv is None and site.norm is not None and not dense(value_of(site.norm.node)):
            return "a norm whose result is neither contiguous nor channels_last"
        return safety.overwritten(site, self.graph, self.order)

    def finishes(self, input: fx.Node) -> bool:
        """Whether a reader of ``input`` can apply the norm or the addition of the site that makes it."""
        return any(site.output is input and (site.norm or site.add) for site in self.sites)

    def ends_in_a_kernel(self, site: Match) -> bool:
        """Whether a kernel of ours may save passes that PyTorch makes around a convolution alone.

        On a GPU, of 16-bit pictures: the bias, and an activation behind it, in the convolution's epilogue.
        """
        value = value_of(site.output)
        if value.device.type != "cuda" or value.dtype not in _WITH_EPILOGUE:
            return False
        reads_a_site = any(other.output is site.input for other in self.sites)
        return len(site.steps) > 1 or reads_a_site

    def barrier(self, node: fx.Node, reader: fx.Node) -> str | None:
        """What keeps ``node`` and ``reader`` apart: a barrier between the two, or None."""
        first, last = self.order[node], self.order[reader]
        name = next((b.name for b in self.graph.barriers if first < self.order[b] < last), None)
        return name and f"{name} writes in place, or switches a mode, between {node.name} and {reader.name}"

    def report_leftovers(self) -> None:
        """Say of each unfused pad, upsample and pixel shuffle why it stayed."""
        for node in self.graph.graph.nodes:
            if node in self.taken or node.name in self.misses:
                continue
            step: Step | Miss | None = None
            if self.operation(node) is spelling.PAD:
                step = patterns.pad(node)
            elif self.operation(node) is spelling.INTERPOLATE:
                step = patterns.upsample(node)
            elif node.op == "call_function" and node.target in patterns.LEFT:
                step = Miss(node.name, patterns.LEFT[node.target])
            if isinstance(step, Miss):
                self.miss(step)
            elif step is not None:
                self.miss(Miss(node.name, "its reader is not a convolution that is fused"))
