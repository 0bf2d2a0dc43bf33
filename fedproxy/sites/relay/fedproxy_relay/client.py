"""The relay at a site: hands a message to the site's own process, which decides what is done, and its answer back."""

import os
import socket
import time

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedproxy_relay.frames import receive, send
from fedproxy_relay.records import packed, unpacked

app = ClientApp()


@app.query()
def serve(message: Message, context: Context) -> Message:
    """Answer one message; whatever goes wrong here is told in one of three words."""
    left = message.metadata.created_at + message.metadata.ttl - time.time()
    try:
        head, payload = unpacked(message.content)
        answer = _ask(head, payload, max(1.0, left))
    except TimeoutError:
        answer = {"error": "late"}, b""
    except (OSError, EOFError):
        answer = {"error": "site_down"}, b""
    except Exception:  # its text would go to the server
        answer = {"error": "not_ours"}, b""
    return Message(packed(*answer), reply_to=message)


def _ask(head: dict, payload: bytes, seconds: float) -> tuple[dict, bytes]:
    with socket.socket(socket.AF_UNIX) as place:
        place.settimeout(seconds)
        place.connect(os.environ.get("FEDPROXY_SITE_SOCKET", ""))
        with place.makefile("rwb") as stream:
            send(stream, head, payload)
            del payload
            return receive(stream)
