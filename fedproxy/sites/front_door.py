"""The front door: TLS towards the sites, and behind it of Flower's SuperLink what sites need alone.

Flower's API for starting runs asks for no password, so it must not be reached from outside.
"""

import os
import shutil
from pathlib import Path

from fedproxy.errors import ConfigError
from fedproxy.files import private_folder, write_text
from fedproxy.sites.hub_config import HubPlace

_NGINX = """\
# Written by python -m fedproxy.hub; changes are lost.
worker_processes 1;
daemon off;
pid {work}/nginx.pid;
error_log {work}/nginx_errors.log;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  server_tokens off;
  client_body_temp_path {work}/unused;
  proxy_temp_path {work}/unused;
  fastcgi_temp_path {work}/unused;
  uwsgi_temp_path {work}/unused;
  scgi_temp_path {work}/unused;
  client_max_body_size 8m;      # Flower sends pieces of 5 MB
  client_header_timeout 30s;
  client_body_timeout 60s;
  send_timeout 60s;
  keepalive_timeout 75s;
  limit_conn_zone $binary_remote_addr zone=sites:1m;
  server {{
    listen {listen}:{port} ssl;
    ssl_certificate {keys}/hub.crt;
    ssl_certificate_key {keys}/hub.key;
    ssl_protocols TLSv1.2 TLSv1.3;
    limit_conn sites 64;
    proxy_http_version 1.1;
    proxy_request_buffering off;  # nothing of what passes is kept in files
    proxy_buffering off;
    proxy_ssl_verify on;
    proxy_ssl_trusted_certificate {keys}/ca.crt;
    proxy_ssl_name localhost;
    proxy_read_timeout 120s;
    location /v1/fleet/ {{ proxy_pass https://127.0.0.1:{superlink}; }}
    location = /health {{ proxy_pass https://127.0.0.1:{superlink}; }}
    location / {{ return 404; }}  # above all /v1/control/ and /v1/runtime/
  }}
}}
"""

_CADDY = """\
# Written by python -m fedproxy.hub as a pattern for an own Caddy.
{{
  admin off
  auto_https off
}}
:{port} {{
  tls {keys}/hub.crt {keys}/hub.key
  request_body {{
    max_size 8MB
  }}
  @sites path /v1/fleet/* /health
  handle @sites {{
    reverse_proxy https://127.0.0.1:{superlink} {{
      transport http {{
        tls_trust_pool file {keys}/ca.crt
        tls_server_name localhost
      }}
    }}
  }}
  respond 404
}}
"""


def write_front_door(place: HubPlace) -> Path:
    """Write the configuration of nginx, and that of Caddy as a pattern, and return the former's path."""
    work = private_folder(place.folder / "front_door")
    facts = {
        "work": _quoted(work.absolute()),
        "keys": _quoted(place.keys.absolute()),
        "listen": place.config.listen,
        "port": place.config.port,
        "superlink": place.config.superlink_port,
    }
    write_text(work / "Caddyfile", _CADDY.format(**facts))
    return write_text(work / "nginx.conf", _NGINX.format(**facts))


def nginx_command(place: HubPlace) -> list[str]:
    """Return the command of the front door.

    Raises:
        ConfigError: If nginx is not there.
    """
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    found = place.config.nginx or shutil.which("nginx", path=places)
    if not found:
        raise ConfigError(
            "front_door=nginx: there is no nginx here; install it (apt-get install nginx-light), name it under nginx, "
            "or write front_door: external and run a front door of your own"
        )
    work = place.folder.absolute() / "front_door"
    return [found, "-c", str(work / "nginx.conf"), "-p", str(work), "-e", str(work / "nginx_errors.log")]


def _quoted(path: Path) -> str:
    """Return a path that can stand in both files.

    Raises:
        ConfigError: If it has characters that mean something there.
    """
    text = str(path)
    if any(character in text for character in " \t\"'{};$\\#"):
        raise ConfigError(f"folder: {text!r} has signs that a front door's file cannot hold; use a plain path")
    return text
