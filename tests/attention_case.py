"""Random calls of the linear branch, and what a form of it makes of them, held against the recurrence in fp64."""

import torch
from lightning_attention import lightning_attention
from lightning_attention.reference import recurrent_attention

SLOPES = (0.0, 0.0039, 0.96, 7.9, 0.1, 0.02)


def relative(found, wanted):
    """Largest relative L2 error of a head, `[B, T, H, D]`; of everything for other shapes.

    Gradients that are zero up to rounding count as of size 1/50; that of a fixed decay, a sum over all tokens, of 10.
    """
    error, size = (found.double() - wanted.double()), wanted.double()
    axes = (0, 1, 3) if wanted.dim() == 4 else tuple(range(wanted.dim()))
    least = 10 if wanted.dim() == 1 else 0.02
    return float((error.pow(2).mean(axes).sqrt() / size.pow(2).mean(axes).sqrt().clamp(min=least)).max())


def placed(x, layout):
    """The same numbers in other strides, those between them NaN."""
    if layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "within":
        rows, length, heads, dim = x.shape
        room = torch.full((rows, length + 2, heads + 1, dim + 8), torch.nan, dtype=x.dtype, device=x.device)
        room[:, :length, :heads, :dim] = x
        return room[:, :length, :heads, :dim]
    return x


class Case:
    """Random operands, and what a form makes of them: output, final state and all gradients."""

    def __init__(self, length, *, rows=2, heads=2, shared=2, dim=16, value_dim=16, states="shared", per_token=False,
                 hidden=False, normalize=False, started=False, final=False, bounds=None, decay=False, scale=None,
                 dtype=torch.float32, device="cpu", segment=None, slopes=SLOPES, layout="plain", seed=0,
                 log_sum=None):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def random(*size):
            return torch.randn(*size, generator=generator).to(device)

        rows = 1 if bounds else rows
        held = shared if states == "shared" else heads
        count = len(bounds) - 1 if bounds else rows
        q, k, v = (
            random(rows, length, heads, dim),
            random(rows, length, shared, dim),
            random(rows, length, shared, value_dim),
        )
        if normalize:
            q, k = q.abs(), k.abs()
        self.inputs = [placed(x.to(dtype), layout) for x in (q, k, v)]
        self.log_decay = -torch.tensor(slopes)[torch.arange(held) % len(slopes)].to(device)
        if per_token:
            self.log_decay = self.log_decay * torch.rand(rows, length, held, generator=generator).to(device)
        self.states = []
        if started:
            self.states = [random(count, held, dim, value_dim)] + [random(count, held, dim).abs() * 3] * normalize
        mask = torch.rand(rows, length, generator=generator).to(device) > 0.3 if hidden else None
        starts = torch.tensor(bounds, device=device) if bounds else None
        if bounds and layout == "within":  # a column of a table
            starts = torch.stack((starts, starts), 1)[:, 0]
        self.options = {
            "scale": scale,
            "cu_seqlens": starts,
            "mask": mask,
            "normalize": normalize,
            "output_final_state": final,
            "return_log_sum": normalize if log_sum is None else log_sum,
        }
        self.of_sum = random(rows, length, heads)
        do = random(rows, length, heads, value_dim).to(dtype).float()  # as autograd hands it to the kernels
        self.do, self.decay, self.segment = placed(do, layout), decay, segment
        self.leaving = [random(count, held, dim, value_dim), random(count, held, dim)]

    def run(self, form, dtype=None, **more):
        """Output, final states, gradients."""
        leaves = [(x if dtype is None else x.to(dtype)).detach().requires_grad_() for x in self.inputs]
        single = torch.float64 if dtype == torch.float64 else torch.float32
        log_decay = self.log_decay.to(single).requires_grad_(self.decay)
        states = [x.to(single).requires_grad_() for x in self.states]
        initial = None if not states else states[0] if len(states) == 1 else tuple(states)
        out, final, *log_sum = form(*leaves, log_decay, initial_state=initial, **self.options, **more)
        finals = [] if final is None else list(final) if isinstance(final, tuple) else [final]
        loss = (out.to(single) * self.do.to(single)).sum()
        for x, y in zip(finals, self.leaving, strict=False):
            loss = loss + (x * y.to(single)).sum()
        for x in log_sum:
            loss = loss + (x * self.of_sum.to(single)).sum()
        wanted = [*leaves, *([log_decay] if self.decay else []), *states]
        return [x.detach() for x in (out, *finals, *log_sum, *torch.autograd.grad(loss, wanted))]

    def compare(self, limit, limit_gradient=None):
        more = {}
        if self.segment:
            from lightning_attention.linear_op import lightning_attention_kernel as form

            more["segment"] = self.segment
        else:
            form = lightning_attention
        found, wanted = self.run(form, **more), self.run(recurrent_attention, torch.float64)
        outputs = len(found) - 3 - self.decay - len(self.states)
        for i, (x, y) in enumerate(zip(found, wanted, strict=True)):
            bound = limit if i < outputs else limit_gradient or limit
            if 0 < i < outputs - self.options["return_log_sum"]:  # a state, `[N, Hs, ...]`
                x, y, bound = x.flatten(2)[:, None], y.flatten(2)[:, None], min(limit, 1e-3)
            assert relative(x, y) <= bound, (i, relative(x, y))
