//! The route of `realtime_token` as the `tokenProvider` of the client.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::time::sleep;

use crate::servers::Servers;

#[tokio::test]
#[ignore = "needs Node and Chromium"]
async fn a_socket_outlives_the_token_it_was_opened_with() {
    let life = 2;
    let more = ["--allow-app", "fal-ai/flux", "--lifetime", &life.to_string()];
    let mut servers = Servers::of("realtime_token", &more).await;
    let connect = format!(
        "globalThis.tokens = []; globalThis.results = []; globalThis.errors = [];
         globalThis.connection = fal.realtime.connect('fal-ai/flux', {{
             tokenProvider: async (app) => {{
                 const answer = await fetch(`/api/fal/token?app=${{encodeURIComponent(app)}}`);
                 tokens.push((await answer.json()).token);
                 return tokens.at(-1);
             }},
             tokenExpirationSeconds: {life},
             throttleInterval: 0,
             onResult: (result) => results.push(result),
             onError: (error) => errors.push(error.message),
         }});
         globalThis.ask = async (number) => {{
             connection.send({{ number }});
             while (!results.some((result) => result.number === number)) {{
                 if (errors.length) throw new Error(errors);
                 await new Promise((resolve) => setTimeout(resolve, 10));
             }}
             return number;
         }};
         return await ask(1)"
    );
    let handshakes = |servers: &Servers| {
        let all = servers.fal.received().into_iter();
        all.filter(|request| request.path == "/fal-ai/flux/realtime").count()
    };
    let opened = Instant::now();
    assert_eq!(servers.page.call(&connect).await, 1);
    // How long the first token really lives: it is handed out again for a while.
    let asked = servers.fal.received().into_iter().find(|request| request.path == "/tokens/realtime").unwrap();
    let asked: Value = serde_json::from_slice(&asked.body.unwrap()).unwrap();
    let ends = Duration::from_secs(asked["duration"].as_u64().unwrap());
    let mut number = 1;
    while opened.elapsed() <= ends + Duration::from_secs(1) {
        sleep(Duration::from_secs(life)).await;
        number += 1;
        assert_eq!(servers.page.call(&format!("return await ask({number})")).await, number);
    }
    // It is the same socket, and the client has asked for other tokens meanwhile.
    assert_eq!((handshakes(&servers), servers.fal.runs()), (1, number));
    let tokens = servers.page.call("return [tokens.length, new Set(tokens).size]").await;
    assert!(tokens[0].as_u64() >= Some(3) && tokens[1].as_u64() >= Some(2), "{tokens}");

    // The first token is no longer worth anything, and a socket of now takes the newest.
    let refused = "return await new Promise((resolve) => {
        const socket = new WebSocket(`wss://fal.run/fal-ai/flux/realtime?fal_jwt_token=${tokens[0]}`);
        socket.onmessage = (message) => resolve(JSON.parse(message.data));
    })";
    assert_eq!(servers.page.call(refused).await, json!({"status": "error", "error": "Unauthorized"}));
    // The client calls each close without a code an error.
    let again = "connection.close();
        while (!errors.length) await new Promise((resolve) => setTimeout(resolve, 10));
        errors.length = 0;
        return await ask(100)";
    assert_eq!(servers.page.call(again).await, 100);
    assert_eq!(handshakes(&servers), 3);

    let other = servers.page.call("return (await fetch('/api/fal/token?app=fal-ai/sdxl/realtime')).status").await;
    assert_eq!(other, 403);
    servers.stop().await;
}
