//! Every call of the client that goes through a proxy.

use http::Method;
use serde_json::{Value, json};

use crate::servers::Servers;

/// What the page expects of an application that answers with its input.
fn of(result: &Value, path: &str) -> bool {
    result["path"] == path && result["prompt"] == "a cat"
}

fn header<'a>(request: &'a tower_fal::mock::Received, name: &str) -> Option<&'a str> {
    request.headers.get(name).map(|value| value.to_str().unwrap())
}

#[tokio::test]
#[ignore = "needs Node and Chromium"]
async fn run_by_post_by_get_and_by_url() {
    let mut servers = Servers::start(&[]).await;
    let page = &mut servers.page;
    let body = "return await fal.run('fal-ai/flux/dev', {
        input: { prompt: 'a cat' }, startTimeout: 60, storageSettings: { expiresIn: '1h' },
    })";
    let result = page.call(body).await;
    assert!(of(&result["data"], "/fal-ai/flux/dev"), "{result}");
    assert!(result["requestId"].as_str().is_some_and(|id| !id.is_empty()), "{result}");

    let input = "{ prompt: 'a cat / a dog: 1+1', 'x?': '%2F#' }";
    let result = page.call(&format!("return await fal.run('fal-ai/sdxl', {{ method: 'get', input: {input} }})")).await;
    assert_eq!(result["data"]["path"], "/fal-ai/sdxl");
    let expected = page.call(&format!("return new URLSearchParams({input}).toString()")).await;

    let result = page.call("return await fal.run('https://fal.run/fal-ai/url', { input: { prompt: 'a cat' } })").await;
    assert!(of(&result["data"], "/fal-ai/url/"), "{result}");
    for namespace in ["workflows", "comfy"] {
        let path = format!("{namespace}/owner/app");
        let result = page.call(&format!("return await fal.run('{path}', {{ input: {{ prompt: 'a cat' }} }})")).await;
        assert!(of(&result["data"], &format!("/{path}")), "{result}");
    }

    let posted = servers.received("/fal-ai/flux/dev");
    assert_eq!((&posted.method, posted.body.as_deref()), (&Method::POST, Some(br#"{"prompt":"a cat"}"#.as_slice())));
    assert_eq!(header(&posted, "x-fal-request-timeout"), Some("60"));
    let lifecycle = header(&posted, "x-fal-object-lifecycle-preference").unwrap();
    assert_eq!(serde_json::from_str::<Value>(lifecycle).unwrap(), json!({"expiration_duration_seconds": 3600}));
    assert!(header(&posted, "x-fal-client-proxy").is_some_and(|name| name.starts_with("tower-fal")), "{posted:?}");
    for name in ["x-fal-target-url", "cookie", "origin", "referer"] {
        assert_eq!(header(&posted, name), None, "{name}");
    }
    let got = servers.received("/fal-ai/sdxl");
    assert_eq!((&got.method, got.query.as_deref(), got.body_length), (&Method::GET, expected.as_str(), Some(0)));
    assert_eq!(servers.fal.runs(), 5);
    servers.stop().await;
}

#[tokio::test]
#[ignore = "needs Node and Chromium"]
async fn submit_status_result_and_cancel() {
    let mut servers = Servers::start(&["--allow-webhook", "hooks.example.com"]).await;
    let page = &mut servers.page;
    let body = "return await fal.queue.submit('fal-ai/flux/dev', {
        input: { prompt: 'a cat' }, priority: 'low', hint: 'a-hint', webhookUrl: 'https://hooks.example.com/done?x=1',
        headers: { 'X-Fal-No-Retry': '1', 'x-app-fal-disable-fallback': '1', 'X-Custom': 'no', Cookie: 'no' },
    })";
    let submitted = page.call(body).await;
    assert_eq!(submitted["status"], "IN_QUEUE");
    let id = submitted["request_id"].as_str().unwrap().to_owned();
    let follow = format!("'fal-ai/flux/dev', {{ requestId: '{id}', logs: true }}");
    for (status, lines) in [("IN_QUEUE", None), ("IN_PROGRESS", Some(1)), ("COMPLETED", Some(2))] {
        let answer = page.call(&format!("return await fal.queue.status({follow})")).await;
        assert_eq!(answer["status"], status);
        assert_eq!(answer["logs"].as_array().map(Vec::len), lines, "{answer}");
    }
    let answer = page.call(&format!("return await fal.queue.status('fal-ai/flux', {{ requestId: '{id}' }})")).await;
    assert_eq!((&answer["status"], &answer["logs"]), (&json!("COMPLETED"), &Value::Null));
    let result = page.call(&format!("return await fal.queue.result({follow})")).await;
    assert!(of(&result["data"], "/fal-ai/flux/dev"), "{result}");

    for app in ["workflows/owner/app", "comfy/owner/app/below"] {
        let body = format!(
            "const {{ request_id: requestId }} = await fal.queue.submit('{app}', {{ input: {{ prompt: 'a cat' }} }});
             await fal.queue.cancel('{app}', {{ requestId }});
             return await fal.queue.result('{app}', {{ requestId }})"
        );
        let error = page.run(&body).await.unwrap_err();
        assert_eq!((&error["status"], &error["body"]["error_type"]), (&json!(499), &json!("client_cancelled")));
    }

    let submit = servers.received("/fal-ai/flux/dev");
    assert_eq!(submit.query.as_deref(), Some("fal_webhook=https%3A%2F%2Fhooks.example.com%2Fdone%3Fx%3D1"));
    let sent = ["x-fal-queue-priority", "x-fal-runner-hint", "x-fal-no-retry", "x-app-fal-disable-fallback"];
    assert_eq!(sent.map(|name| header(&submit, name).unwrap()), ["low", "a-hint", "1", "1"]);
    assert_eq!((header(&submit, "x-custom"), header(&submit, "cookie")), (None, None));
    assert_eq!(servers.fal.runs(), 3);
    servers.stop().await;
}

#[tokio::test]
#[ignore = "needs Node and Chromium"]
async fn subscribe_by_polls_and_by_a_stream() {
    let mut servers = Servers::start(&[]).await;
    for mode in ["polling", "streaming"] {
        let body = format!(
            "const seen = [];
             const result = await fal.subscribe('fal-ai/{mode}/dev', {{
                 input: {{ prompt: 'a cat' }}, logs: true, mode: '{mode}', pollInterval: 50,
                 onQueueUpdate: (update) => seen.push([update.status, (update.logs ?? []).map((line) => line.message)]),
             }});
             return {{ result, seen }}"
        );
        let ended = servers.page.call(&body).await;
        assert!(of(&ended["result"]["data"], &format!("/fal-ai/{mode}/dev")), "{ended}");
        let both = json!(["step 1", "step 2"]);
        assert_eq!(
            ended["seen"],
            json!([["IN_QUEUE", []], ["IN_PROGRESS", ["step 1"]], ["COMPLETED", both]]),
            "{mode}"
        );
    }
    let body = "const { request_id: requestId } = await fal.queue.submit('comfy/a/b', { input: {} });
        const stream = await fal.queue.streamStatus('comfy/a/b', { requestId });
        const seen = [];
        for await (const status of stream) seen.push(status.status);
        return { seen, done: (await stream.done()).status }";
    let ended = servers.page.call(body).await;
    assert_eq!(ended, json!({"seen": ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"], "done": "COMPLETED"}));
    assert_eq!(servers.fal.runs(), 3);
    servers.stop().await;
}

#[tokio::test]
#[ignore = "needs Node and Chromium"]
async fn stream_by_post_and_by_get() {
    let mut servers = Servers::start(&[]).await;
    for (method, options) in [("post", "input: { prompt: 'a cat' }"), ("get", "queryParams: { prompt: 'a cat' }")] {
        servers.fal.hold_events_after(1);
        let body = format!(
            "const stream = await fal.stream('fal-ai/flux/{method}', {{ method: '{method}', {options} }});
             globalThis.events = [];
             stream.on('data', ({{ event, path }}) => events.push([event, path]));
             globalThis.done = stream.done();
             while (!events.length) await new Promise((resolve) => setTimeout(resolve, 10));
             return events"
        );
        let path = format!("/fal-ai/flux/{method}/stream");
        // The first event is here before the second one exists.
        assert_eq!(servers.page.call(&body).await, json!([[0, path]]));
        servers.fal.hold_events_after(usize::MAX);
        let all = servers.page.call("await done; return events").await;
        assert_eq!(all, json!([[0, path], [1, path], [2, path]]));
        let received = servers.received(&path);
        assert_eq!(header(&received, "accept"), Some("application/json, text/event-stream"));
    }
    assert_eq!(servers.fal.runs(), 2);
    servers.stop().await;
}

#[tokio::test]
#[ignore = "needs Node and Chromium"]
async fn upload_whole_in_parts_and_as_input() {
    let mut servers = Servers::start(&[]).await;
    let body = "return await fal.storage.upload(new Blob(['meow'], { type: 'image/png' }), { lifecycle: { expiresIn: '1d' } })";
    let url = servers.page.call(body).await;
    assert!(url.as_str().unwrap().starts_with("https://v3.fal.media/files/"), "{url}");
    let initiate = servers.received("/storage/upload/initiate");
    assert_eq!(initiate.query.as_deref(), Some("storage_type=fal-cdn-v3"));
    let lifecycle = serde_json::from_str::<Value>(header(&initiate, "x-fal-object-lifecycle").unwrap()).unwrap();
    assert_eq!(lifecycle, json!({"expiration_duration_seconds": 86_400}));

    // More than 90 MiB go in parts of 10 MiB, straight to the storage.
    let url = servers.page.call("return await fal.storage.upload(new Blob([new Uint8Array(91 * 1024 * 1024)]))").await;
    assert!(url.as_str().unwrap().starts_with("https://v3.fal.media/files/"), "{url}");
    servers.received("/storage/upload/initiate-multipart");
    let stored = |method: Method| {
        let all = servers.fal.received().into_iter();
        all.filter(|request| request.host.starts_with("v3.") && request.method == method).collect::<Vec<_>>()
    };
    let parts: Vec<_> = stored(Method::PUT).iter().skip(1).map(|part| part.body_length.unwrap()).collect();
    let mib = 1024 * 1024;
    assert_eq!(parts, [[10 * mib; 9].as_slice(), &[mib]].concat());
    assert!(stored(Method::POST)[0].path.ends_with("/complete"));

    let body = "return await fal.run('fal-ai/flux', { input: { prompt: 'a cat', image: new Blob(['meow'], { type: 'image/png' }) } })";
    let result = servers.page.call(body).await;
    assert!(of(&result["data"], "/fal-ai/flux"), "{result}");
    let input: Value = serde_json::from_slice(&servers.received("/fal-ai/flux").body.unwrap()).unwrap();
    assert!(input["image"].as_str().unwrap().starts_with("https://v3.fal.media/files/"), "{input}");
    assert_eq!(servers.fal.runs(), 1);
    servers.stop().await;
}

#[tokio::test]
#[ignore = "needs Node and Chromium"]
async fn a_socket_with_the_token_of_the_proxy() {
    let mut servers = Servers::start(&["--allow-realtime", "fal-ai/flux"]).await;
    let connect = |app: &str| {
        format!(
            "return await new Promise((resolve, reject) => {{
                 const connection = fal.realtime.connect('{app}', {{ onResult: resolve, onError: reject }});
                 connection.send({{ prompt: 'a cat' }});
                 setTimeout(() => reject(new Error('nothing came')), 3000);
             }})"
        )
    };
    // The mock returns the msgpack of the client.
    assert_eq!(servers.page.call(&connect("fal-ai/flux")).await, json!({"prompt": "a cat"}));
    assert_eq!(servers.fal.runs(), 1);
    let asked: Value = serde_json::from_slice(&servers.received("/tokens/").body.unwrap()).unwrap();
    assert_eq!(asked, json!({"allowed_apps": ["flux"], "token_expiration": 120}));
    // An app that is not listed gets no token, and the client says nothing of it.
    servers.page.run(&connect("fal-ai/sdxl")).await.unwrap_err();
    servers.received("/tokens/");
    servers.stop().await;
}
