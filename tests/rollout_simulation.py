"""An engine without a model. Its cache records for every slot which tokens the content was computed from."""

from flashpo.rollout import prefix_tree
from flashpo.rollout.scheduler import Row, Scheduler


class Engine:
    """Prefills, decodes and ends rows as a `Scheduler` says, and checks that whatever it reads is what it wants.

    A completion's next token follows from its tokens so far: it is the same after a preemption. How many it samples is
    given with its prompt.
    """

    def __init__(self, blocks, max_rows, *, hybrid=False, expected_tokens=None):
        self.scheduler = Scheduler(blocks, max_rows, whole_nodes_only=hybrid, expected_tokens=expected_tokens)
        self.hybrid = hybrid
        self.requests = []  # (space, prompt, lengths of its completions)
        self.finished = {}  # (prompt_index, index) -> completion
        self.cache = {}  # slot -> (space, tokens up to and with the one in this slot)
        self.states = {}  # running row -> the same for its logits and, in a hybrid, its states
        self.log = []  # of every decision

    def add(self, prompt, lengths, *, spare=0, space=None):
        """`spare`: by how much max_new_tokens is above the longest."""
        index = len(self.requests)
        rows = self.scheduler.add(
            prompt, prompt_index=index, n=len(lengths), max_new_tokens=max(lengths) + spare, space=space
        )
        assert [(row.prompt_index, row.index, row.tokens) for row in rows] == [(index, i, []) for i in range(len(rows))]
        self.requests.append((space, prompt, lengths))
        return rows

    def round(self, steps=1):
        """What happens between two looks at the sampled tokens."""
        self.start()
        self.end()
        for row in self.scheduler.grow(steps):
            self.lose(row)
        for _ in range(steps):
            self.step()
            self.end()

    def run(self, steps=1):
        while self.scheduler.unfinished:
            self.round(steps)
        return self.finished

    def start(self):
        plan = self.scheduler.plan()
        assert bool(self.scheduler.rows) == bool(self.scheduler.unfinished), "nothing runs though something could"
        for segment in plan.prefill:
            row = next(row for row in plan.started if segment in (*row.ancestors, row))
            space, tokens = self.content(row, segment.end)
            assert tuple(segment.tokens) == tokens[segment.start :]
            self.read(segment.ancestors, (space, tokens[: segment.start]))
            if self.hybrid and segment.start:
                assert segment.parent.payload == (space, tokens[: segment.start])
            for i in range(len(segment.tokens)):
                self.cache[self.slot(segment, i)] = (space, tokens[: segment.start + i + 1])
            if isinstance(segment, Row):
                self.states[segment] = (space, tokens)
            elif segment.ends or self.hybrid:
                segment.payload = (space, tokens)
        self.log += [("prefill", segment.start, *segment.tokens) for segment in plan.prefill]
        for row in plan.started:
            if row not in plan.prefill:
                assert not row.tokens
                assert row.parent.ends
                self.states[row] = row.parent.payload
            self.log.append(("start", row.prompt_index, row.index))
            self.sample(row)

    def preempt(self, row):
        self.scheduler.preempt(row)
        self.lose(row)

    def lose(self, row):
        self.log.append(("preempted", row.prompt_index, row.index))
        del self.states[row]

    def reset(self):
        self.scheduler.reset()
        self.states.clear()

    def step(self):
        """Feeds every row its last token and samples the next, reading the cache as `rows` and `shared` say."""
        rows, shared = self.scheduler.rows, self.scheduler.shared
        for i, row in enumerate(rows):
            self.cache[self.slot(row, len(row.tokens) - 1)] = self.content(row, row.position + 1)
            self.read([*(x.node for x in shared if x.begin <= i < x.end), row], self.content(row, row.end))
        for row in rows:
            assert self.states[row] == self.content(row, row.position)
            self.states[row] = self.content(row, row.end)
            self.sample(row)

    def end(self):
        for row in list(self.scheduler.rows):
            if len(row.tokens) == self.requests[row.prompt_index][2][row.index]:
                assert (row.prompt_index, row.index) not in self.finished
                self.finished[row.prompt_index, row.index] = tuple(row.tokens)
                self.log.append(("end", row.prompt_index, row.index))
                node, state = self.scheduler.finish(row), self.states.pop(row)
                if node and self.hybrid:
                    node.payload = state

    def sample(self, row):
        """From the logits or states that the row has come to, which must be those of all its tokens."""
        assert self.states[row] == self.content(row, row.end)
        row.tokens.append((sum(self.states[row][1]) + row.index) % 2)

    def content(self, row, length):
        space, prompt, _ = self.requests[row.prompt_index]
        return space, (*prompt, *row.tokens)[:length]

    def slot(self, segment, i):
        block = segment.blocks[i // prefix_tree.BLOCK]
        assert block != 0
        return block * prefix_tree.BLOCK + i % prefix_tree.BLOCK

    def read(self, segments, content):
        """The segments hold exactly the tokens of `content`, each computed after all those before it."""
        space, tokens = content
        slots = [self.slot(segment, i) for segment in segments for i in range(len(segment.tokens))]
        assert [self.cache.get(slot) for slot in slots] == [(space, tokens[: i + 1]) for i in range(len(tokens))]

    def check(self):
        """Every block has one owner; every count is what the rows say; nothing is left that nobody wants."""
        scheduler, tree = self.scheduler, self.scheduler._tree
        nodes, level = [], list(tree._roots.values())
        while level:
            level = [child for node in level for children in node.children.values() for child in children]
            nodes += level
        owned = [block for segment in (*nodes, *scheduler.rows) for block in segment.blocks]
        assert len(owned) == len(set(owned)) == tree.allocator.used
        assert set(owned) == tree.allocator._owned
        assert sorted((*owned, *tree.allocator._free)) == list(range(1, tree.allocator.capacity + 1))
        for node in nodes:
            below = [[node in row.ancestors for row in rows] for rows in (scheduler.rows, scheduler._waiting)]
            assert (node.running, node.waiting) == tuple(map(sum, below))
            assert sum(a != b for a, b in zip([False, *below[0]], [*below[0], False])) in (0, 2), "rows apart"
            assert node.running == 0 or node.blocks
            assert node.running or node.waiting or (tree.keep and node.blocks)
            if node.blocks:
                assert len(node.blocks) == prefix_tree.blocks_for(len(node.tokens))
                assert node.parent.blocks or not node.parent.parent, "cached below one that is not"
            else:
                assert node.payload is None
        assert set(tree._idle) == {node for node in nodes if node.blocks and not node.running}
        for node in nodes:
            assert all(node.last_used <= x.last_used for x in node.ancestors), "a parent would go before its child"
        for row in (*scheduler.rows, *scheduler._waiting):
            space, prompt, _ = self.requests[row.prompt_index]
            assert sum((node.tokens for node in row.ancestors), ()) == prompt
            assert row.ancestors[0].parent is tree._roots[space]
            assert row.start == len(prompt)
        assert len(scheduler.rows) <= scheduler.max_rows
        assert all(not row.blocks for row in scheduler._waiting)
