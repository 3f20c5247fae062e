"""Who may use the page: nobody from another site, nobody under another name, nothing outside the folders."""

from __future__ import annotations

import pytest

from sdlora.studio.guard import is_loopback


@pytest.mark.parametrize("host", ["localhost", "localhost:7865", "127.0.0.1:1", "[::1]:80"])
def test_this_machine_is_answered(client, host):
    assert client().get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example:7865", "10.0.0.1", "", "127.0.0.1.evil"]
)
def test_another_name_is_refused(client, host):
    """A name that another site resolves to this machine."""
    assert client().get("/", headers={"host": host}).status_code == 421


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none"},
        {"origin": ""},
    ],
)
def test_another_site_cannot_change_anything(client, make_run, headers):
    run, page = make_run(done=4), client()
    for place in ("/start", f"/resume/{run.name}", f"/prune/{run.name}", "/paint", "/rate"):
        assert page.post(place, headers=headers).status_code == 403, place
    assert not run.output_file.exists()


def test_a_body_is_limited(client):
    assert client().post("/plan", content=b"x" * (2**23 + 1)).status_code == 413


def test_a_token_is_asked_for(client):
    """On another interface: once in the address, then in a cookie that other sites do not send."""
    page = client(token="secret")
    other = {"host": "lab.example:7865"}
    assert page.get("/", headers=other).status_code == 401
    assert page.get("/?token=wrong", headers=other).status_code == 401
    assert page.get("/", headers={**other, "cookie": "sdlora-token=wrong"}).status_code == 401
    opened = page.get("/new?preset=sd15&token=secret", headers=other, follow_redirects=False)
    assert opened.headers["location"] == "/new?preset=sd15"
    cookie = opened.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert page.get("/", headers={**other, "cookie": "sdlora-token=secret"}).status_code == 200
    assert page.post("/plan", headers={**other, "origin": "http://evil"}).status_code == 403


def test_headers_keep_other_sites_out(client):
    headers = client().get("/").headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "..%2Foutside",
        "%2e%2e/outside",
        "link",
        "style/../../outside",
        "/etc",
        "a%00b",
        "style/adapters",
    ],
)
def test_only_runs_of_the_folder_are_read(client, make_run, runs, name):
    """No path leads out of the folder, and no link."""
    make_run()
    outside = make_run("../outside", grid=10)
    (runs / "link").symlink_to(outside.path)
    page = client()
    assert "outside" not in page.get("/").text
    assert "link" not in page.get("/").text.replace("<link", "")
    for place in ("run", "grid", "strip"):
        assert page.get(f"/{place}/{name}?step=10").status_code == 404
    assert page.post(f"/resume/{name}").status_code in (404, 405)
    assert not outside.output_file.exists()


def test_links_inside_a_run_lead_nowhere(client, make_run, tmp_path):
    run = make_run(grid=10)
    grid = run.sample_folder(10) / "grid.png"
    grid.rename(tmp_path / "grid.png")
    grid.symlink_to(tmp_path / "grid.png")
    assert client().get(f"/grid/{run.name}?step=10").status_code == 404


def test_only_known_images_are_read(client, make_images, tmp_path):
    images = make_images()
    (tmp_path / "secret.png").write_bytes((images / "00.png").read_bytes())
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    page = client(images)
    [name] = [part.split('"')[0] for part in page.get("/images").text.split("/images/")[1:]]
    assert page.get(f"/thumb/{name}/00.png").status_code == 200
    for place in (
        f"{name}/../secret.png",
        f"{name}/%2e%2e/secret.png",
        f"{name}/link.png",
        f"{name}/00.txt",
        "0/00.png",
    ):
        assert page.get(f"/thumb/{place}").status_code == 404, place


def test_text_is_escaped(client, make_run, make_images):
    """What a run or a folder says is text, not markup."""
    run = make_run("<b>&'name", done=4, images=make_images("<i>pictures"))
    run.append("warning", 4, message="<script>alert(1)</script>")
    run.append("failed", 4, message="<img src=x>")
    for place in ("/", "/run/%3Cb%3E&'name", "/new", "/images", "/compare", "/playground"):
        text = client().get(place).text
        assert all(tag not in text for tag in ("<b>&", "<i>", "<script>alert", "<img src=x")), place


def test_loopback():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.8.8.8", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.1.1.1", "example.com", "")))
