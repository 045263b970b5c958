#!/usr/bin/env python3
"""Measures what a proxy in front of fal costs: `python3 benches/proxy/run.py --help`. README.md says what it means."""

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PATH = "/api/fal/proxy"
KEY = "bench:not-a-secret"
KINDS = ["json", "large", "stream"]
SCHEMES = ["http", "https"]
PROXIES = ["direct", "nginx", "relay", "service", "ours", "express", "hono"]

NGINX = """
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log stderr error;
events {{ worker_connections 20480; }}
http {{
  access_log off;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  client_max_body_size 2g;
  keepalive_requests 1000000000;
  map $http_x_fal_target_url $target {{ "~^https://fal\\.run(?<path>/.*)$" $path; }}
  upstream fal {{ server 127.0.0.1:{upstream}; keepalive 512; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    location {path} {{
      proxy_pass {scheme}://fal$target;
      proxy_http_version 1.1;
      proxy_buffering off;
      proxy_request_buffering off;
      proxy_read_timeout 1h;
      proxy_set_header Connection "";
      proxy_set_header Host fal.run;
      proxy_set_header Authorization "Key {key}";
      proxy_set_header x-fal-target-url "";
      proxy_ssl_server_name on;
      proxy_ssl_name fal.run;
      proxy_ssl_verify on;
      proxy_ssl_trusted_certificate {ca};
    }}
  }}
}}
"""


def free_port():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


class Process:
    """A program on one core, which has ended when the block ends."""

    def __init__(self, core, command, port, **more):
        self.command, self.port, self.core, self.more = command, port, core, more

    def __enter__(self):
        command = ["taskset", "-c", str(self.core), *map(str, self.command)]
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, **self.more)
        self.pid = self.process.pid  # taskset becomes the program
        for _ in range(300):
            if self.process.poll() is not None:
                break
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return self
            except OSError:
                time.sleep(0.1)
        sys.exit(f"{' '.join(command)} does not listen:\n{self.said()}")

    def said(self):
        self.log.seek(0)
        return self.log.read().decode(errors="replace")[-2000:]

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Bench:
    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.core, self.other = options.cores
        self.built = Path(options.target_dir) / "release"
        self.ca = folder / "ca.pem"
        self.key_file = folder / "key"
        self.key_file.write_text(KEY)
        self.key_file.chmod(0o600)
        self.keys = folder / "keys"
        self.ports = {scheme: free_port() for scheme in SCHEMES}

    def upstream(self):
        ports = self.ports
        command = [self.built / "upstream", "--http", f"127.0.0.1:{ports['http']}",
                   "--https", f"127.0.0.1:{ports['https']}", "--ca-out", self.ca]
        if self.options.rotate:
            command += ["--keys", self.keys]
        return Process(self.other, command, ports["http"])

    def proxy(self, name, scheme):
        port, upstream = free_port(), self.ports[scheme]
        more = {}
        if name == "nginx":
            conf = self.folder / f"nginx-{scheme}.conf"
            conf.write_text(NGINX.format(folder=self.folder, upstream=upstream, port=port, path=PATH, scheme=scheme,
                                         key=KEY, ca=self.ca))
            # The worker alone does the work, so there is no master.
            command = ["nginx", "-c", conf, "-g", "master_process off; user root;" if os.geteuid() == 0 else "master_process off;"]
        elif name in ("relay", "service", "ours"):
            to = "--connect-to" if scheme == "https" else "--connect-to-http"
            command = [to, f"127.0.0.1:{upstream}", "--listen", f"127.0.0.1:{port}"]
            command += ["--ca-file", self.ca] if scheme == "https" or name == "ours" else []
            if name == "ours":
                command += ["--allow-anonymous", "--key-file", self.key_file, "--admin", "127.0.0.1:0",
                            *(["--max-body", "2000000000"] if self.options.memory else []), *self.options.ours]
            command = [self.built / name, *command]
        else:
            command = ["node", HERE / "node" / "server.mjs", name, port, scheme, upstream]
            more["env"] = {**os.environ, "FAL_KEY": KEY, "CA_FILE": str(self.ca), "NODE_ENV": "production"}
        return Process(self.core, command, port, **more)

    def load(self, kind, connections, requests, proxy=None, scheme="http", rate=None):
        command = ["taskset", "-c", str(self.other), self.built / "load", "--kind", kind,
                   "--connections", connections, "--requests", requests]
        if rate:
            command += ["--rate", rate]
        if proxy:
            command += ["--connect", f"127.0.0.1:{proxy.port}", "--proxy-path", PATH, "--pid", proxy.pid]
        else:
            command += ["--connect", f"127.0.0.1:{self.ports[scheme]}"]
            command += ["--ca-file", self.ca] if scheme == "https" else []
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, timeout=1800)
        if done.returncode:
            sys.exit(f"the load failed: {' '.join(map(str, command))}")
        return json.loads(done.stdout.replace("NaN", "null"))


class Rotation:
    """Rotates the key of our proxy every second while the block runs. As in the manual, fal accepts the new key before it
    is in the file, and the old one for longer than an upload takes: until there are OVERLAP newer ones."""

    OVERLAP = 10

    def __init__(self, bench):
        self.bench, self.number, self.ended = bench, 1, threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.accept(1)
        self.use(1)

    def key(self, number):
        return f"bench-{number}:not-a-secret"

    def accept(self, *numbers):
        self.write(self.bench.keys, "".join(self.key(number) + "\n" for number in numbers))

    def use(self, number):
        self.write(self.bench.key_file, self.key(number))

    def write(self, path, text):
        new = path.with_suffix(".new")
        new.write_text(text)
        new.rename(path)

    def run(self):
        while not self.ended.wait(1):
            self.number += 1
            self.accept(*range(max(1, self.number - self.OVERLAP), self.number + 1))
            time.sleep(0.1)  # the upstream reads its file every 20 ms
            self.use(self.number)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()


def build(options):
    subprocess.run(["cargo", "build", "--locked", "--release", "--target-dir", options.target_dir], cwd=HERE, check=True)
    if {"express", "hono"} & set(options.proxies) and not (HERE / "node" / "node_modules").exists():
        subprocess.run(["npm", "ci", "--silent"], cwd=HERE / "node", check=True)
    if "nginx" in options.proxies and not shutil.which("nginx"):
        sys.exit("there is no nginx (Debian: apt-get install nginx-light); or leave it out: --proxies relay,ours")


def rounds(bench, options):
    """Each row is measured several times, and the proxies take turns, so that a busy moment meets all of them."""
    rows = {}
    for scheme in options.schemes:
        for turn in range(options.rounds):
            for name in options.proxies:
                requests = options.requests // 10 if name in ("express", "hono") else options.requests
                for kind in options.kinds:
                    for connections in options.connections:
                        count = requests // {"json": 1, "large": 2, "stream": 10}[kind]
                        if name == "direct":
                            found = bench.load(kind, connections, count, scheme=scheme)
                        else:
                            with bench.proxy(name, scheme) as proxy:
                                found = bench.load(kind, connections, count, proxy)
                                if found["failures"]:
                                    sys.exit(f"{found['failures']} failed: {name} {scheme} {kind}\n{proxy.said()}")
                        rows.setdefault((scheme, kind, connections, name), []).append(found)
                        print(f"{scheme:5} {kind:6} {connections:3} {name:7} round {turn + 1}: "
                              f"{found['cpu_per_10000'] or 0:7.3f} s  {found['per_second']:9.0f}/s", file=sys.stderr)
    return rows


def table(rows, options):
    lines = ["| upstream | answer | connections | proxy | CPU s per 10,000 | to the relay | to nginx | requests/s | p50 ms | p99 ms | first event p50 ms | peak MiB |",
             "|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    number = lambda value, digits: "" if value is None else f"{value:.{digits}f}"
    # The least of the CPU times: what else runs on the machine can only add to it.
    least = lambda found, name: min((one[name] for one in found if one[name] is not None), default=None)
    middle = lambda found, name: statistics.median(values) if (values := [one[name] for one in found if one[name] is not None]) else None
    for (scheme, kind, connections, name), found in sorted(rows.items(), key=lambda row: (row[0][0], KINDS.index(row[0][1]), row[0][2], PROXIES.index(row[0][3]))):
        cpu = least(found, "cpu_per_10000")
        ratio = lambda to: (cpu / other if cpu and (other := least(rows.get((scheme, kind, connections, to), []), "cpu_per_10000")) else None)
        lines.append(" | ".join(["| " + scheme, kind, str(connections), name, number(cpu, 3), number(ratio("relay"), 2),
                                 number(ratio("nginx"), 2), number(max(one["per_second"] for one in found), 0),
                                 number(middle(found, "p50_ms"), 2), number(middle(found, "p99_ms"), 2),
                                 number(middle(found, "first_event_p50_ms"), 2),
                                 number(middle(found, "peak_mib"), 1)]) + " |")
    return "\n".join(lines)


def memory(bench, options):
    lines = ["| proxy | 1 GiB up, peak MiB | 1 GiB down, peak MiB | idle streams | MiB before | MiB with them | KiB a stream |",
             "|---|--:|--:|--:|--:|--:|--:|"]
    for name in [name for name in options.proxies if name in ("nginx", "relay", "ours")]:
        found = {}
        for kind in ("upload", "download"):
            with bench.proxy(name, "http") as proxy:
                found[kind] = bench.load(kind, 1, 1, proxy)["peak_mib"]
        with bench.proxy(name, "http") as proxy:
            before = bench.load("json", 1, 10, proxy)["rss_mib"]
            idle = bench.load("idle", options.idle, options.idle, proxy)
        each = (idle["rss_mib"] - before) * 1024 / idle["open"]
        lines.append(f"| {name} | {found['upload']:.1f} | {found['download']:.1f} | {idle['open']} | {before:.1f} | "
                     f"{idle['rss_mib']:.1f} | {each:.1f} |")
    return "\n".join(lines)


def rotate(bench, options):
    lines = ["| body | rate asked for | rate reached | requests | failed | rotations | p50 ms | p99 ms |",
             "|---|--:|--:|--:|--:|--:|--:|--:|"]
    for kind, body in (("json", "1 KiB"), ("long", "300 KiB")):
        rotation = Rotation(bench)
        with bench.upstream(), bench.proxy("ours", "http") as proxy, rotation:
            found = bench.load(kind, options.connections[0], options.rate * options.seconds, proxy, rate=options.rate)
            if found["failures"]:
                print(f"{found['failures']} failed: {body}\n{proxy.said()}", file=sys.stderr)
        lines.append(f"| {body} | {options.rate} | {found['per_second']:.0f} | {found['requests']} | {found['failures']} | "
                     f"{rotation.number - 1} | {found['p50_ms']:.2f} | {found['p99_ms']:.2f} |")
    return "\n".join(lines)


def main():
    words = lambda text: text.split(",")
    numbers = lambda text: [int(word) for word in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--proxies", type=words, default=PROXIES, help="some of " + ",".join(PROXIES))
    parser.add_argument("--kinds", type=words, default=KINDS, help="some of " + ",".join(KINDS))
    parser.add_argument("--schemes", type=words, default=SCHEMES, help="how the proxy reaches the upstream")
    parser.add_argument("--connections", type=numbers, default=[16, 256])
    parser.add_argument("--requests", type=int, default=20_000, help="of JSON in a round; of others there are fewer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="measure memory, and nothing else")
    parser.add_argument("--rotate", action="store_true", help="rotate the key of our proxy every second, and nothing else")
    parser.add_argument("--rate", type=int, default=1_000, help="how many requests begin in a second with --rotate")
    parser.add_argument("--seconds", type=int, default=20, help="for how long with --rotate")
    parser.add_argument("--idle", type=int, default=5_000, help="how many streams stay open with --memory")
    parser.add_argument("--cores", type=numbers, default=[0, 1], help="that of the proxy, and that of all others")
    parser.add_argument("--ours", type=str.split, default=[], help="more options for our proxy")
    parser.add_argument("--target-dir", default=str(ROOT / "target" / "benches-proxy"))
    parser.add_argument("--no-build", action="store_true")
    options = parser.parse_args()
    if not options.no_build:
        build(options)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        if options.rotate:
            return print(rotate(bench, options))
        with bench.upstream():
            print(memory(bench, options) if options.memory else table(rounds(bench, options), options))


if __name__ == "__main__":
    main()
