//! The page of `proxy --demo`, on a phone.

use serde_json::json;
use tokio::process::Command;

use crate::{
    browser::Page,
    servers::{ended, example, started},
};

/// Presses a button, and waits until the answer says this.
fn press(button: &str, answer: &str) -> String {
    format!(
        "const button = document.getElementById('{button}');
         while (button.disabled) await new Promise((resolve) => setTimeout(resolve, 10));
         button.click();
         return await said('{answer}')"
    )
}

async fn works(more: &[&str], client: &str) {
    let mut command = Command::new(example("proxy"));
    command.args(["--demo", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]).args(more);
    let (proxy, origin, log) = started(command).await;
    let mut page = Page::at(&origin).await;
    let begin = format!(
        "globalThis.wait = async (done) => {{ while (!done()) await new Promise((resolve) => setTimeout(resolve, 10)); }};
         globalThis.text = (id) => document.getElementById(id).textContent;
         globalThis.said = async (words) => {{
             await wait(() => text('answer').includes(words) || text('answer').includes('Failed'));
             return text('answer').includes(words) || text('answer');
         }};
         await wait(() => text('client').includes('{client}'))"
    );
    page.call(&begin).await;
    for (button, answer) in [
        ("run", "a lighthouse at night"),
        ("subscribe", "log: step 2"),
        ("stream", "The stream has ended."),
        ("cancel", "fal was asked to cancel it."),
    ] {
        assert_eq!(page.call(&press(button, answer)).await, true, "{button}");
    }
    let upload = "const files = new DataTransfer();
        files.items.add(new File(['meow'], 'cat.png', { type: 'image/png' }));
        document.getElementById('upload').files = files.files;
        document.getElementById('upload').dispatchEvent(new Event('change'));
        return await said('/files/')";
    assert_eq!(page.call(upload).await, true);

    let rotation = "document.getElementById('keep').click();
        const requests = () => document.getElementById('requests').textContent;
        await wait(() => Number(text('answered')) >= 5);
        document.getElementById('rotate').click();
        await wait(() => text('key') === 'demo-key-2' && requests().includes('401 refused'));
        const answered = Number(text('answered'));
        await wait(() => Number(text('answered')) >= answered + 5);
        document.getElementById('keep').click();
        return [text('failed'), text('generation'), text('ready').trim()]";
    assert_eq!(page.call(rotation).await, json!(["0", "generation 2", "ready"]));
    assert_eq!(page.call("return document.documentElement.scrollWidth - innerWidth").await, 0);
    page.close().await;
    assert!(!ended(proxy, log).await.contains("not-a-secret"));
}

#[tokio::test]
#[ignore = "needs Node and Chromium"]
async fn the_demo_page_works_with_the_official_client() {
    let node_modules = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/node_modules");
    works(&["--client-dir", node_modules], "own JavaScript client").await;
}

#[tokio::test]
#[ignore = "needs Node and Chromium"]
async fn the_demo_page_works_with_plain_fetch() {
    works(&[], "It uses plain fetch.").await;
}
