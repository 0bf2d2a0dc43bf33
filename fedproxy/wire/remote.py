"""Clients at real sites, as the round loop sees them: broadcasts go out in parts, updates come back as files."""

import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fedproxy
from fedproxy.errors import CheckpointError, ClientError, one_line
from fedproxy.messages import Answer, Answers, Done, Dropped, Message, UpdateFile, Working, nobody
from fedproxy.protocol import Broadcast
from fedproxy.wire import link as wire
from fedproxy.wire.bundle import Bundle, unpack
from fedproxy.wire.frames import NOTHING, Head, Source
from fedproxy.wire.link import Link
from fedproxy.wire.messages import LONGEST_S, PROTOCOL, Greeting, Setup

_log = logging.getLogger(__name__)
_STARTS_S = 420.0
"""Seconds beyond its own limit that a site has in its first round: its workers load the proxy then."""
_HELLO_S, _QUESTION_S, _CLOCK_S = 60.0, 600.0, 300.0


class RemoteSites:
    """Reaches clients at the sites that hold them.

    Args:
        link: The way there.
        run: Name of the run, which says nothing of it.
        sites: Names of the sites.
        folder: Where files lie on their way; removed in the end.
    """

    def __init__(self, link: Link, run: str, sites: Sequence[str], folder: Path) -> None:
        self.link, self.run_id, self.sites, self.folder = link, run, list(sites), folder
        self.rows: dict[str, int] = {}
        """Clients with their numbers of rows, as their sites say."""
        self.converse = False
        """Whether there are conversations among their rows."""
        self.working: Working = nobody
        """Told nothing: sites say no more than they are asked."""
        self._site_of: dict[str, str] = {}
        self._warm = False

    def greet(self, setup: Setup | None = None) -> dict[str, Greeting]:
        """Say hello to all sites, and note whose clients they are.

        A site that is online is waited for, since it takes no message before the round ends that it is at, maybe one
        of a run that was killed.

        Args:
            setup: How clients are to be made; None before there is a proxy.

        Raises:
            ClientError: If a site does not answer, refuses, or has a client that another one has too.
        """
        said = None if setup is None else asdict(setup)
        line = {
            "kind": "hello",
            "run": self.run_id,
            "protocol": PROTOCOL,
            "version": fedproxy.__version__,
            "setup": said,
        }
        found: dict[str, Greeting] = {}
        for answer in self.link.ask(dict.fromkeys(self.sites, line), LONGEST_S, remind_s=_HELLO_S):
            if answer.lost is not None:
                raise ClientError(_lost(answer.site, answer.lost))
            try:
                found[answer.site] = Greeting.parse(answer.head.get("greeting"))
            except ClientError as error:
                raise ClientError(_lost(answer.site, str(error))) from error
            self._check_clock(answer.site, found[answer.site].clock)
        self._note_clients(found)
        return found

    def bring(self, setup: Setup, proxy: Bundle, *, send: bool) -> None:
        """Bring the proxy to sites that do not have it.

        Args:
            setup: How clients are made of it.
            proxy: The proxy's files.
            send: Whether it may be sent; else sites must have it.

        Raises:
            ClientError: If a site does not take it, or has to have it and does not.
        """
        have = {site: greeting.have for site, greeting in self.greet(setup).items()}
        lacking = sorted(site for site, there in have.items() if there < proxy.size)
        if lacking and not send:
            raise ClientError(f"site {lacking[0]!r} does not hold the proxy, and engine.proxy=expect sends none")
        if not lacking:
            return
        _log.info("sending the proxy (%.0f MiB) to %s", proxy.size / 2**20, ", ".join(lacking))
        lost = self.link.send(self.run_id, proxy, have, all_of_it=True)
        for site, why in lost.items():
            raise ClientError(_lost(site, why))
        self.greet(setup)  # sites unpack it now

    def run(self, broadcast: Broadcast, client_ids: Sequence[str], *, timeout_s: float | None = None) -> Answers:
        """Run the clients of one round; see :class:`fedproxy.messages.Sites`.

        A site counts the time itself, and answers with what is finished by then.

        Raises:
            ClientError: If the courier does not work and cannot be opened again.
            CheckpointError: If the broadcast cannot be written.
        """
        folder = self._begin()
        by_site = self._by_site(client_ids)
        bundles = self._bundles(broadcast, by_site, folder)
        seconds = min(timeout_s or LONGEST_S, LONGEST_S)
        lost = self._send(bundles)
        lines, payloads = dict[str, Head](), dict[str, Source]()
        last = {id(bundle): self.link.last_part(bundle) for bundle, _ in bundles.values()}
        for site, clients in by_site.items():
            if site in lost:
                continue
            bundle, places = bundles[site]
            piece, payloads[site] = last[id(bundle)]
            own = {client: broadcast.addressed_to(client).beside() for client in clients}
            task = {"round": broadcast.round, "own": own, "files": places, "bundle": bundle.sha256, "seconds": seconds}
            lines[site] = self._line("train", task=task, piece=piece)
        for site, why in lost.items():
            yield from (Dropped(client, _lost(site, why)) for client in by_site[site])
        margin = wire.MARGIN_S if self._warm else _STARTS_S
        yield from self._answers(lines, payloads, by_site, seconds, margin, folder)
        self._warm = True

    def ask(self, messages: Mapping[str, Message]) -> Answers:
        """Send each client its message; see :class:`fedproxy.messages.Sites`.

        Raises:
            ClientError: If the courier does not work and cannot be opened again.
            CheckpointError: If the tensors that go with it cannot be written.
        """
        folder = self._begin()
        by_site = self._by_site(list(messages))
        bundle = self._tensors(messages, folder)
        lost = {} if bundle is None else self.link.send(self.run_id, bundle, dict.fromkeys(by_site, 0), all_of_it=False)
        piece, payload = (None, NOTHING) if bundle is None else self.link.last_part(bundle)
        for site, why in lost.items():
            yield from (Dropped(client, _lost(site, why)) for client in by_site[site])
        lines = {}
        for site, names in by_site.items():
            if site not in lost:
                plain = {name: messages[name].plain() for name in names}
                sha = None if bundle is None else bundle.sha256
                question = {"messages": plain, "seconds": _QUESTION_S, "bundle": sha}
                lines[site] = self._line("ask", question=question, piece=piece)
        payloads = dict.fromkeys(lines, payload)
        yield from self._answers(lines, payloads, by_site, _QUESTION_S, _STARTS_S, folder, messages)

    def _tensors(self, messages: Mapping[str, Message], folder: Path) -> Bundle | None:
        """Return what goes with messages; all that are sent at once bring the same."""
        groups = next((message.tensors for message in messages.values() if message.tensors), None)
        if groups is None:
            return None
        try:
            Broadcast(0, {}, extras=groups).save(folder / "all")
        except OSError as error:
            raise _unwritten(folder, error) from error
        return Bundle({"00000": folder / "all"})

    def close(self) -> None:
        """Hang up, and remove what lay on its way."""
        self.link.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _line(self, kind: str, **more: Any) -> Head:
        return {"kind": kind, "run": self.run_id, "part": self.link.terms.part_bytes, **more}

    def _begin(self) -> Path:
        """Return an empty folder for the files of what is asked now; those of what was asked before go."""
        folder = self.folder / "now"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise _unwritten(folder, error) from error
        return folder

    def _by_site(self, clients: Sequence[str]) -> dict[str, list[str]]:
        """Return whose clients are whose.

        Raises:
            ClientError: If no site has a client of this name.
        """
        by_site: dict[str, list[str]] = {}
        for client in clients:
            if client not in self._site_of:
                raise ClientError(
                    f"no site has a client {client!r} any more; have its site hold it again under this name, or start "
                    "again with overwrite=true"
                )
            by_site.setdefault(self._site_of[client], []).append(client)
        return by_site

    def _bundles(
        self, broadcast: Broadcast, by_site: Mapping[str, Sequence[str]], folder: Path
    ) -> dict[str, tuple[Bundle, dict[str, int]]]:
        """Write what the sites are sent: one file for all, or one for each client.

        Returns:
            For each site its bundle, and which file of it each client starts from.
        """
        try:
            if broadcast.each is None:
                broadcast.save(folder / "all")
                shared = Bundle({"00000": folder / "all"})
                return {site: (shared, dict.fromkeys(clients, 0)) for site, clients in by_site.items()}
            found = dict[str, tuple[Bundle, dict[str, int]]]()
            for site, clients in by_site.items():
                files = {f"{place:05d}": folder / f"{len(found)}_{place}" for place in range(len(clients))}
                for client, path in zip(clients, files.values(), strict=True):
                    broadcast.addressed_to(client).save(path)
                found[site] = Bundle(files), {client: place for place, client in enumerate(clients)}
            return found
        except OSError as error:
            raise _unwritten(folder, error) from error

    def _send(self, bundles: Mapping[str, tuple[Bundle, dict[str, int]]]) -> dict[str, str]:
        """Send all parts but the last, and return which sites did not take them."""
        groups: dict[int, list[str]] = {}
        for site, (bundle, _) in bundles.items():
            groups.setdefault(id(bundle), []).append(site)
        lost: dict[str, str] = {}
        for sites in groups.values():
            bundle = bundles[sites[0]][0]
            lost |= self.link.send(self.run_id, bundle, dict.fromkeys(sites, 0), all_of_it=False)
        return lost

    def _answers(
        self,
        lines: Mapping[str, Head],
        payloads: Mapping[str, Source],
        by_site: Mapping[str, Sequence[str]],
        seconds: float,
        margin_s: float,
        folder: Path,
        messages: Mapping[str, Message] | None = None,
    ) -> Answers:
        most = self.link.terms.part_bytes
        for answer in self.link.ask(lines, seconds, payloads, most=most, margin_s=margin_s):
            clients = by_site[answer.site]
            if answer.lost is not None:
                yield from (Dropped(client, _lost(answer.site, answer.lost)) for client in clients)
                continue
            try:
                found = list(self._taken(answer, clients, folder / f"from_{len(list(folder.iterdir()))}", messages))
            except ClientError as error:
                found = [Dropped(client, _lost(answer.site, str(error))) for client in clients]
            except OSError as error:
                raise _unwritten(folder, error) from error
            yield from found

    def _taken(
        self, answer: wire.Came, clients: Sequence[str], folder: Path, messages: Mapping[str, Message] | None
    ) -> Iterator[Answer]:
        """Yield what a site answers for its clients; nothing of it is trusted.

        Raises:
            ClientError: If it is not an answer for each of them.
        """
        said = answer.head.get("answers")
        if not isinstance(said, dict) or said.keys() != set(clients):
            raise ClientError("it answers for other clients than it was asked for")
        files = sorted(str(own["file"]) for own in said.values() if isinstance(own, dict) and "file" in own)
        if files:
            whole = self.link.fetch(self.run_id, answer)
            unpack(whole, folder, names=files)
            whole.unlink()
        for client in clients:
            match said[client]:
                case {"file": str(name)} if files.count(name) == 1:
                    yield UpdateFile(client, folder / name)
                case {"dropped": str(why)}:
                    yield Dropped(client, one_line(why))
                case {"done": True}:
                    yield Done(client)
                case {"says": says} if messages is not None:
                    yield messages[client].answered(client, says, folder)
                case _:
                    raise ClientError("it answers with what is no answer")

    def _note_clients(self, found: Mapping[str, Greeting]) -> None:
        owners: dict[str, str] = {}
        for site in self.sites:
            for client in found[site].clients:
                other = owners.setdefault(client, site)
                if other != site:
                    raise ClientError(
                        f"sites {other!r} and {site!r} both have a client {client!r}; rename one in its site.yaml"
                    )
        self._site_of = owners
        self.converse = any(greeting.converse for greeting in found.values())
        self.rows = {client: found[site].clients[client] for client, site in sorted(owners.items())}

    def _check_clock(self, site: str, clock: float) -> None:
        off = clock - time.time()
        if abs(off) > _CLOCK_S:
            _log.warning("the clock of site %r is off by %.0f s; set it, or its messages will be refused", site, off)


def _lost(site: str, why: str) -> str:
    return f"site {site!r}: {why}"


def _unwritten(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{folder} cannot be written ({error.strerror or error}); free disk space, then resume=auto")
