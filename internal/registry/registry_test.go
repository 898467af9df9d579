package registry_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ondol-dev/ondol/internal/imagetest"
	"github.com/ondol-dev/ondol/internal/registry"
)

func newClient(t *testing.T, o registry.Options) *registry.Client {
	t.Helper()
	if o.Keychain == nil {
		o.Keychain = authn.NewMultiKeychain()
	}
	c, err := registry.NewClient(o)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

type keychain struct{ user, password string }

func (k keychain) Resolve(authn.Resource) (authn.Authenticator, error) {
	return &authn.Basic{Username: k.user, Password: k.password}, nil
}

func repo(reg *imagetest.Registry, path string) registry.Repository {
	return registry.Repository{Host: reg.Host, Path: path}
}

func blob(content string) registry.Blob {
	return registry.Blob{
		Descriptor: ocispec.Descriptor{Digest: digest.FromString(content), Size: int64(len(content))},
		Open: func(context.Context) (io.ReadCloser, error) {
			return io.NopCloser(strings.NewReader(content)), nil
		},
	}
}

func push(t *testing.T, c *registry.Client, to registry.Repository, b registry.Blob) registry.How {
	t.Helper()
	how, err := c.PushBlob(t.Context(), to, b)
	if err != nil {
		t.Fatal(err)
	}
	return how
}

func TestParseReference(t *testing.T) {
	const d = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	for in, want := range map[string][2]string{
		"busybox":                     {"docker.io/library/busybox:latest", "busybox:latest"},
		"user/app:1":                  {"docker.io/user/app:1", "user/app:1"},
		"localhost:5000/a/b":          {"localhost:5000/a/b:latest", "localhost:5000/a/b:latest"},
		"quay.io/x/y@" + d:            {"quay.io/x/y@" + d, "quay.io/x/y@" + d},
		"index.docker.io/busybox:1":   {"docker.io/library/busybox:1", "busybox:1"},
		"quay.io/x/y:tag@" + d:        {"quay.io/x/y:tag@" + d, "quay.io/x/y:tag@" + d},
		"docker.io/library/busybox:1": {"docker.io/library/busybox:1", "busybox:1"},
	} {
		r, err := registry.ParseReference(in)
		if err != nil || r.String() != want[0] || r.Familiar() != want[1] {
			t.Errorf("%s: %q, %q, %v, want %q", in, r.String(), r.Familiar(), err, want)
		}
	}
	for _, bad := range []string{"", "UPPER", "a b", "a:b:c", "x@sha256:12", "-x"} {
		if _, err := registry.ParseReference(bad); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q", bad)) {
			t.Errorf("%q: error %v", bad, err)
		}
	}
	if _, err := registry.ParseRepository("a/b:c"); err == nil {
		t.Error("a repository with a tag was accepted")
	}
}

func TestBlobResumes(t *testing.T) {
	content := strings.Repeat("0123456789", 10_000)
	for _, tt := range []struct {
		name  string
		fault func(*imagetest.Registry)
		want  string // of the error
	}{
		{"no fault", func(*imagetest.Registry) {}, ""},
		{"cut four times", func(r *imagetest.Registry) { r.CutBlobs(4, 20_000) }, ""},
		{"cut before the first byte", func(r *imagetest.Registry) { r.CutBlobs(1, 0) }, ""},
		{"cut, then unavailable", func(r *imagetest.Registry) { r.CutBlobs(1, 7); r.Add(imagetest.Fail(2, 503, "GET", "blobs")) }, ""},
		{"cut for ever", func(r *imagetest.Registry) { r.CutBlobs(1, 11); r.CutBlobs(100, 0) }, "after 11 of 100000 bytes"},
		{"no ranges", func(r *imagetest.Registry) {
			r.CutBlobs(1, 50_000)
			r.Add(func(_ http.ResponseWriter, req *http.Request) bool { req.Header.Del("Range"); return false })
		}, ""},
		{"wrong range", func(r *imagetest.Registry) {
			r.CutBlobs(1, 50_000)
			r.Add(func(_ http.ResponseWriter, req *http.Request) bool {
				if req.Header.Get("Range") != "" {
					req.Header.Set("Range", "bytes=3-")
				}
				return false
			})
		}, "asked for bytes from 50000"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			reg := imagetest.NewRegistry(t)
			c := newClient(t, registry.Options{})
			b := blob(content)
			push(t, c, repo(reg, "a"), b)
			tt.fault(reg)
			r, err := c.Blob(t.Context(), repo(reg, "a"), b.Descriptor)
			var got []byte
			if err == nil {
				got, err = io.ReadAll(r)
				r.Close()
			}
			if tt.want == "" {
				if err != nil || string(got) != content {
					t.Errorf("%d bytes, error %v", len(got), err)
				}
			} else if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
		})
	}
}

func TestBlobCancel(t *testing.T) {
	reg := imagetest.NewRegistry(t)
	c := newClient(t, registry.Options{})
	b := blob("content")
	push(t, c, repo(reg, "a"), b)
	reg.Add(imagetest.Fail(100, 503, "GET"))
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	cancel(why)
	if _, err := c.Blob(ctx, repo(reg, "a"), b.Descriptor); !errors.Is(err, why) {
		t.Errorf("error %v, want %v", err, why)
	}
}

func TestBlobBytesVerifies(t *testing.T) {
	reg := imagetest.NewRegistry(t)
	c := newClient(t, registry.Options{})
	b := blob("right")
	push(t, c, repo(reg, "a"), b)
	reg.Add(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == "GET" {
			w.Write([]byte("wrong"))
		}
		return r.Method == "GET"
	})
	if _, err := c.BlobBytes(t.Context(), repo(reg, "a"), b.Descriptor, 100); !errors.Is(err, registry.ErrDigest) {
		t.Errorf("error %v, want %v", err, registry.ErrDigest)
	}
	if _, err := c.BlobBytes(t.Context(), repo(reg, "a"), b.Descriptor, 4); err == nil || !strings.Contains(err.Error(), "more than 4") {
		t.Errorf("a blob over the limit: %v", err)
	}
}

func TestPush(t *testing.T) {
	reg := imagetest.NewRegistry(t)
	c := newClient(t, registry.Options{})
	b := blob("layer")
	if how := push(t, c, repo(reg, "a"), b); how != registry.Uploaded {
		t.Errorf("first push: %s", how)
	}
	if how := push(t, c, repo(reg, "a"), b); how != registry.Existed {
		t.Errorf("second push: %s", how)
	}
	b.From = []registry.Repository{{Host: "elsewhere", Path: "x"}, repo(reg, "a")}
	b.Open = func(context.Context) (io.ReadCloser, error) { return nil, errors.New("must not be opened") }
	reg.Requests()
	if how := push(t, c, repo(reg, "b"), b); how != registry.Mounted {
		t.Errorf("push with a mount: %s", how)
	}
	b.Fresh = true
	if how := push(t, c, repo(reg, "c"), b); how != registry.Mounted {
		t.Errorf("push with a mount: %s", how)
	}
	if got := reg.Requests(); len(got) != 3 || !strings.HasPrefix(got[2], "POST") {
		t.Errorf("requests: %q", got)
	}
	// What the other repository does not have is uploaded.
	other := blob("other")
	other.From = []registry.Repository{repo(reg, "a")}
	if how := push(t, c, repo(reg, "b"), other); how != registry.Uploaded {
		t.Errorf("push with a mount that fails: %s", how)
	}
	if how := push(t, c, repo(reg, "a"), blob("")); how != registry.Uploaded {
		t.Errorf("push of nothing: %s", how)
	}
}

func TestPushRetries(t *testing.T) {
	reg := imagetest.NewRegistry(t)
	c := newClient(t, registry.Options{})
	reg.Add(imagetest.Fail(1, 502, "POST"))
	reg.Add(imagetest.Fail(1, 500, "PUT", "uploads"))
	if how := push(t, c, repo(reg, "a"), blob("layer")); how != registry.Uploaded {
		t.Errorf("push: %s", how)
	}
	reg.Add(imagetest.Fail(1, 429, "PUT", "manifests"))
	ref := registry.Reference{Repository: repo(reg, "a"), Tag: "t"}
	manifest := []byte(`{"schemaVersion":2}`)
	if err := c.PushManifest(t.Context(), ref, ocispec.MediaTypeImageManifest, manifest); err != nil {
		t.Fatal(err)
	}
	desc, got, err := c.Manifest(t.Context(), ref)
	if err != nil || !bytes.Equal(got, manifest) || desc.Digest != digest.FromBytes(manifest) || desc.MediaType != ocispec.MediaTypeImageManifest {
		t.Errorf("%+v %s %v", desc, got, err)
	}
	head, err := c.Head(t.Context(), ref)
	if err != nil || head.Digest != desc.Digest || head.Size != desc.Size || head.MediaType != desc.MediaType {
		t.Errorf("HEAD gives %+v, %v", head, err)
	}
	if _, _, err := c.Manifest(t.Context(), registry.Reference{Repository: repo(reg, "a"), Tag: "none"}); !errors.Is(err, registry.ErrNotFound) {
		t.Errorf("missing tag: %v", err)
	}
	reg.Add(imagetest.Fail(1, 403, "PUT", "manifests"))
	if err := c.PushManifest(t.Context(), ref, ocispec.MediaTypeImageManifest, manifest); !errors.Is(err, registry.ErrUnauthorized) {
		t.Errorf("refused push: %v", err)
	}
}

func TestManifestVerifies(t *testing.T) {
	reg := imagetest.NewRegistry(t)
	c := newClient(t, registry.Options{})
	reg.Add(func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		w.Write([]byte("other"))
		return true
	})
	ref := registry.Reference{Repository: repo(reg, "a"), Digest: digest.FromString("this")}
	if _, _, err := c.Manifest(t.Context(), ref); !errors.Is(err, registry.ErrDigest) {
		t.Errorf("error %v, want %v", err, registry.ErrDigest)
	}
}

func TestAuth(t *testing.T) {
	for _, tt := range []struct {
		name     string
		require  func(*imagetest.Registry)
		key      keychain
		refused  string // of the error
		requests int    // for one HEAD, if allowed
	}{
		{"none", func(*imagetest.Registry) {}, keychain{}, "", 1},
		{"basic", func(r *imagetest.Registry) { r.RequireBasic("me", "pw") }, keychain{"me", "pw"}, "", 2},
		{"basic, wrong", func(r *imagetest.Registry) { r.RequireBasic("me", "pw") }, keychain{"me", "no"}, "not authorized", 0},
		{"token", func(r *imagetest.Registry) { r.RequireToken("me", "pw", nil) }, keychain{"me", "pw"}, "", 3},
		{"token, wrong", func(r *imagetest.Registry) { r.RequireToken("me", "pw", nil) }, keychain{"me", "no"}, "not authorized", 0},
		{"token, no right", func(r *imagetest.Registry) { r.RequireToken("me", "pw", func(string) bool { return false }) }, keychain{"me", "pw"}, "not authorized", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			reg := imagetest.NewRegistry(t)
			push(t, newClient(t, registry.Options{}), repo(reg, "a"), blob("x"))
			tt.require(reg)
			c := newClient(t, registry.Options{Keychain: tt.key})
			reg.Requests()
			ok, err := c.HasBlob(t.Context(), repo(reg, "a"), digest.FromString("x"))
			if tt.refused == "" {
				if err != nil || !ok {
					t.Fatalf("%v, %v", ok, err)
				}
				if n := len(reg.Requests()); n != tt.requests {
					t.Errorf("%d requests, want %d", n, tt.requests)
				}
				// What is known is not asked again.
				if _, err := c.HasBlob(t.Context(), repo(reg, "a"), digest.FromString("x")); err != nil || len(reg.Requests()) != 1 {
					t.Errorf("second request: %v", err)
				}
				push(t, c, repo(reg, "a"), blob("y"))
				return
			}
			if !errors.Is(err, registry.ErrUnauthorized) || !strings.Contains(err.Error(), tt.refused) || !strings.Contains(err.Error(), reg.Host) {
				t.Errorf("error %v, want %q", err, tt.refused)
			}
		})
	}
}

// TestMountWithoutRight checks that a missing right to read the repository to
// mount from costs the mount only, not the push.
func TestMountWithoutRight(t *testing.T) {
	reg := imagetest.NewRegistry(t)
	anyone := newClient(t, registry.Options{})
	push(t, anyone, repo(reg, "secret"), blob("x"))
	reg.RequireToken("me", "pw", func(scope string) bool { return !strings.Contains(scope, "secret") })
	reg.Add(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Query().Get("mount") == "" {
			return false
		}
		w.WriteHeader(http.StatusForbidden)
		return true
	})
	b := blob("x")
	b.From = []registry.Repository{repo(reg, "secret")}
	if how := push(t, newClient(t, registry.Options{Keychain: keychain{"me", "pw"}}), repo(reg, "mine"), b); how != registry.Uploaded {
		t.Errorf("push: %s", how)
	}
}

// TestRedirect checks that credentials stay with the registry when it sends
// the client elsewhere for a blob.
func TestRedirect(t *testing.T) {
	var leaked string
	store := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		leaked = r.Header.Get("Authorization")
		w.Write([]byte("content"))
	}))
	defer store.Close()
	reg := imagetest.NewRegistry(t)
	reg.RequireBasic("me", "pw")
	reg.Add(func(w http.ResponseWriter, r *http.Request) bool {
		http.Redirect(w, r, store.URL, http.StatusTemporaryRedirect)
		return true
	})
	c := newClient(t, registry.Options{Keychain: keychain{"me", "pw"}})
	got, err := c.BlobBytes(t.Context(), repo(reg, "a"), blob("content").Descriptor, 100)
	if err != nil || string(got) != "content" {
		t.Errorf("%q, %v", got, err)
	}
	if leaked != "" {
		t.Errorf("the store was sent %q", leaked)
	}
}

func TestTLS(t *testing.T) {
	reg, server := imagetest.NewTLSRegistry(t)
	pem := filepath.Join(t.TempDir(), "ca.pem")
	cert := "-----BEGIN CERTIFICATE-----\n" + base64.StdEncoding.EncodeToString(server.Certificate().Raw) + "\n-----END CERTIFICATE-----\n"
	if err := os.WriteFile(pem, []byte(cert), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		opts registry.Options
		want string
	}{
		{"not trusted", registry.Options{}, "certificate"},
		{"not verified", registry.Options{SkipVerify: true}, ""},
		{"not verified for this host", registry.Options{SkipVerifyHosts: []string{reg.Host}}, ""},
		{"trusted", registry.Options{Certificates: map[string]string{reg.Host: pem}}, ""},
	} {
		_, err := newClient(t, tt.opts).HasBlob(t.Context(), repo(reg, "a"), digest.FromString("x"))
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
	if _, err := registry.NewClient(registry.Options{Certificates: map[string]string{"h": "/none"}}); err == nil || !strings.Contains(err.Error(), "registry h") {
		t.Errorf("missing certificate: %v", err)
	}
}

func TestCheckPush(t *testing.T) {
	reg := imagetest.NewRegistry(t)
	c := newClient(t, registry.Options{Keychain: keychain{"me", "no"}})
	if err := c.CheckPush(t.Context(), repo(reg, "a")); err != nil {
		t.Errorf("open registry: %v", err)
	}
	reg.RequireBasic("me", "pw")
	if err := c.CheckPush(t.Context(), repo(reg, "a")); !errors.Is(err, registry.ErrUnauthorized) {
		t.Errorf("wrong password: %v", err)
	}
	nowhere := newClient(t, registry.Options{Retries: -1})
	if err := nowhere.CheckPush(t.Context(), registry.Repository{Host: "127.0.0.1:1", Path: "a"}); err == nil || !strings.Contains(err.Error(), "127.0.0.1:1/a") {
		t.Errorf("nobody there: %v", err)
	}
}
