// fal's own proxy for JavaScript servers, with its defaults: node server.mjs express|hono PORT http|https PORT-OF-THE-UPSTREAM

import { readFileSync } from "node:fs";
import net from "node:net";
import tls from "node:tls";
import { Agent, setGlobalDispatcher } from "undici";

const [framework, port, scheme, upstreamPort] = process.argv.slice(2);
const path = "/api/fal/proxy";

// Node's own `fetch` uses this too. Every connection ends at the upstream, as with `--connect-to` of the other proxies.
const ca = process.env.CA_FILE && readFileSync(process.env.CA_FILE);
setGlobalDispatcher(
  new Agent({
    connections: 256,
    connect: ({ hostname }, callback) => {
      const to = { host: "127.0.0.1", port: Number(upstreamPort), noDelay: true };
      const secure = scheme === "https";
      const socket = secure ? tls.connect({ ...to, ca, servername: hostname, ALPNProtocols: ["http/1.1"] }) : net.connect(to);
      socket.once(secure ? "secureConnect" : "connect", () => callback(null, socket));
      socket.once("error", (error) => callback(error));
    },
  }),
);

if (framework === "express") {
  const { default: express } = await import("express");
  const { createHandler } = await import("@fal-ai/server-proxy/express");
  const app = express();
  app.use(express.json({ limit: "32mb" }));
  const handler = createHandler();
  // The handler goes on to the next one after it has answered, which must not answer again.
  app.all(path, (request, response) => handler(request, response, () => {}));
  app.listen(Number(port), "127.0.0.1", () => console.log("ready"));
} else {
  const { Hono } = await import("hono");
  const { serve } = await import("@hono/node-server");
  const { createRouteHandler } = await import("@fal-ai/server-proxy/hono");
  const app = new Hono();
  app.all(path, createRouteHandler());
  serve({ fetch: app.fetch, port: Number(port), hostname: "127.0.0.1" }, () => console.log("ready"));
}
