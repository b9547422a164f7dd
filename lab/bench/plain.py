"""The part that all of the bench's own Nginx configurations have in common."""

import shutil

from lab.sim.gateway import Nginx
from stack.shell import ROOT


def write_plain(nginx: Nginx, http: str, main: str = "") -> None:
    """Writes the configuration of one worker without an access log.

    `http` is what stands inside its http block, `main` what stands before all blocks.
    """
    tmp = nginx.tmp_seen
    nginx.conf.mkdir()
    shutil.copy(ROOT / "nginx" / "start.sh", nginx.conf)
    (nginx.conf / "nginx.conf").write_text(f"""
{main}
worker_processes 1;
pid {tmp}/nginx.pid;
error_log stderr;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_max_body_size 64m;
  client_body_buffer_size 1m;
  keepalive_requests 100000000;
  client_body_temp_path {tmp}/client_body;
  proxy_temp_path {tmp}/proxy;
  fastcgi_temp_path {tmp}/fastcgi;
  uwsgi_temp_path {tmp}/uwsgi;
  scgi_temp_path {tmp}/scgi;
{http}
}}
""")
