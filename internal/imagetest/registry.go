package imagetest

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// A Registry is a container registry over HTTP in this process. Blobs belong
// to repositories, as in real ones, and can be mounted from one to another.
type Registry struct {
	// Host is the registry's name, "127.0.0.1:port".
	Host  string
	inner http.Handler
	blobs *blobStore

	mu       sync.Mutex
	requests []string
	faults   []Fault
	delay    time.Duration
	auth     *auth
}

// A Fault looks at a request before the registry does. If it returns true, it
// has answered it.
type Fault func(w http.ResponseWriter, r *http.Request) bool

// NewRegistry starts an empty registry that ends with the test.
func NewRegistry(t testing.TB) *Registry {
	r := newRegistry()
	s := httptest.NewServer(r)
	t.Cleanup(s.Close)
	r.Host = strings.TrimPrefix(s.URL, "http://")
	return r
}

// NoCredentials is a keychain without any, so that those of whoever runs the
// tests stay out of them.
func NoCredentials() authn.Keychain { return authn.NewMultiKeychain() }

// NewTLSRegistry starts an empty registry that speaks HTTPS, with a
// certificate that nobody trusts.
func NewTLSRegistry(t testing.TB) (*Registry, *httptest.Server) {
	r := newRegistry()
	s := httptest.NewUnstartedServer(r)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	r.Host = strings.TrimPrefix(s.URL, "https://")
	return r, s
}

func newRegistry() *Registry {
	blobs := &blobStore{repos: map[string]map[v1.Hash][]byte{}}
	return &Registry{
		blobs: blobs,
		inner: ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0)), ggcr.WithBlobHandler(blobs)),
	}
}

// Add adds a fault. Faults are asked in the order in which they were added.
func (r *Registry) Add(f Fault) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults = append(r.faults, f)
}

// Heal removes all faults.
func (r *Registry) Heal() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults = nil
}

// SetDelay makes every request wait before it is answered.
func (r *Registry) SetDelay(d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.delay = d
}

// Requests returns what was asked for since the last call, as "METHOD path",
// in the order of arrival.
func (r *Registry) Requests() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := r.requests
	r.requests = nil
	return out
}

// Count returns how many of requests contain all of the given parts.
func Count(requests []string, parts ...string) int {
	n := 0
	for _, r := range requests {
		if !slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(r, p) }) {
			n++
		}
	}
	return n
}

// DeleteBlob removes a blob from a repository, as a registry's garbage
// collection does.
func (r *Registry) DeleteBlob(repo, digest string) error {
	h, err := v1.NewHash(digest)
	if err != nil {
		return err
	}
	r.blobs.mu.Lock()
	defer r.blobs.mu.Unlock()
	delete(r.blobs.repos[repo], h)
	return nil
}

// HasBlob reports whether a repository has a blob of its own.
func (r *Registry) HasBlob(repo, digest string) bool {
	h, err := v1.NewHash(digest)
	if err != nil {
		return false
	}
	_, err = r.blobs.Stat(context.Background(), repo, h)
	return err == nil
}

func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	line := req.Method + " " + req.URL.Path
	if req.URL.RawQuery != "" {
		line += "?" + req.URL.RawQuery
	}
	r.requests = append(r.requests, line)
	faults, delay, auth := slices.Clone(r.faults), r.delay, r.auth
	r.mu.Unlock()
	time.Sleep(delay)
	if auth != nil && !auth.admit(w, req) {
		return
	}
	for _, f := range faults {
		if f(w, req) {
			return
		}
	}
	if q := req.URL.Query(); req.Method == http.MethodPost && q.Get("mount") != "" {
		to, _, _ := strings.Cut(strings.TrimPrefix(req.URL.Path, "/v2/"), "/blobs/")
		if r.blobs.mount(to, q.Get("from"), q.Get("mount")) {
			w.Header().Set("Location", "/v2/"+to+"/blobs/"+q.Get("mount"))
			w.WriteHeader(http.StatusCreated)
			return
		}
	}
	if rng := req.Header.Get("Range"); rng != "" && req.Method == http.MethodGet {
		r.serveRange(w, req)
		return
	}
	r.inner.ServeHTTP(w, req)
}

// serveRange answers ranges, open-ended ones too, as real registries do.
func (r *Registry) serveRange(w http.ResponseWriter, req *http.Request) {
	req = req.Clone(req.Context())
	rng := req.Header.Get("Range")
	req.Header.Del("Range")
	rec := httptest.NewRecorder()
	r.inner.ServeHTTP(rec, req)
	if rec.Code != http.StatusOK {
		w.WriteHeader(rec.Code)
		w.Write(rec.Body.Bytes())
		return
	}
	req.Header.Set("Range", rng)
	http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(rec.Body.Bytes()))
}

// blobStore keeps the blobs of each repository apart.
type blobStore struct {
	mu    sync.Mutex
	repos map[string]map[v1.Hash][]byte
}

// repoName undoes what the handler puts around a repository's name.
func repoName(s string) string {
	return strings.TrimSuffix(strings.TrimPrefix(s, "v2/"), "/blobs")
}

func (s *blobStore) Get(_ context.Context, repo string, h v1.Hash) (io.ReadCloser, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.repos[repoName(repo)][h]
	if !ok {
		return nil, ggcr.ErrNotFound
	}
	return io.NopCloser(bytes.NewReader(b)), nil
}

func (s *blobStore) Stat(_ context.Context, repo string, h v1.Hash) (int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.repos[repoName(repo)][h]
	if !ok {
		return 0, ggcr.ErrNotFound
	}
	return int64(len(b)), nil
}

func (s *blobStore) Put(_ context.Context, repo string, h v1.Hash, rc io.ReadCloser) error {
	defer rc.Close()
	b, err := io.ReadAll(rc)
	if err != nil {
		return err
	}
	s.put(repoName(repo), h, b)
	return nil
}

func (s *blobStore) put(repo string, h v1.Hash, b []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.repos[repo] == nil {
		s.repos[repo] = map[v1.Hash][]byte{}
	}
	s.repos[repo][h] = b
}

func (s *blobStore) mount(to, from, digest string) bool {
	h, err := v1.NewHash(digest)
	if err != nil {
		return false
	}
	s.mu.Lock()
	b, ok := s.repos[from][h]
	s.mu.Unlock()
	if ok {
		s.put(to, h, b)
	}
	return ok
}

// auth is the access control of a registry.
type auth struct {
	user, password string
	token          bool
	allow          func(scope string) bool
}

// RequireBasic makes the registry demand a password.
func (r *Registry) RequireBasic(user, password string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.auth = &auth{user: user, password: password}
}

// RequireToken makes the registry demand tokens, which it gives itself to who
// has the password, for each scope that allow, if not nil, says yes to.
func (r *Registry) RequireToken(user, password string, allow func(scope string) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.auth = &auth{user, password, true, allow}
}

func (a *auth) admit(w http.ResponseWriter, req *http.Request) bool {
	user, password, _ := req.BasicAuth()
	known := user == a.user && password == a.password
	if !a.token {
		if known {
			return true
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		refuse(w, http.StatusUnauthorized, "UNAUTHORIZED", "authentication required")
		return false
	}
	if req.URL.Path == "/token" {
		if !known {
			refuse(w, http.StatusUnauthorized, "UNAUTHORIZED", "incorrect username or password")
			return false
		}
		var granted []string
		for _, s := range req.URL.Query()["scope"] {
			if a.allow == nil || a.allow(s) {
				granted = append(granted, s)
			}
		}
		token := base64.StdEncoding.EncodeToString([]byte(strings.Join(granted, " ")))
		json.NewEncoder(w).Encode(map[string]string{"token": token})
		return false
	}
	want := neededScope(req)
	if token, ok := strings.CutPrefix(req.Header.Get("Authorization"), "Bearer "); ok {
		b, _ := base64.StdEncoding.DecodeString(token)
		for s := range strings.FieldsSeq(string(b)) {
			if s == want || s == strings.TrimSuffix(want, ":pull")+":pull,push" {
				return true
			}
		}
	}
	w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="test",scope="%s"`, req.Host, want))
	refuse(w, http.StatusUnauthorized, "UNAUTHORIZED", "access to the requested resource is not authorized")
	return false
}

func neededScope(req *http.Request) string {
	repo := strings.TrimPrefix(req.URL.Path, "/v2/")
	for _, part := range []string{"/manifests/", "/blobs/"} {
		repo, _, _ = strings.Cut(repo, part)
	}
	if req.Method == http.MethodGet || req.Method == http.MethodHead {
		return "repository:" + repo + ":pull"
	}
	return "repository:" + repo + ":pull,push"
}

func refuse(w http.ResponseWriter, code int, id, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	fmt.Fprintf(w, `{"errors":[{"code":%q,"message":%q}]}`, id, message)
}

// Fail answers the next n requests whose method and path contain the given
// parts with a status code.
func Fail(n, code int, parts ...string) Fault {
	var mu sync.Mutex
	return func(w http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		line := r.Method + " " + r.URL.Path
		if n == 0 || slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(line, p) }) {
			return false
		}
		n--
		refuse(w, code, "UNAVAILABLE", "fault injected")
		return true
	}
}

// CutBlobs breaks the connection of the next n requests for blobs after some
// bytes of content.
func (r *Registry) CutBlobs(n, after int) {
	var mu sync.Mutex
	r.Add(func(w http.ResponseWriter, req *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		if n == 0 || req.Method != http.MethodGet || !strings.Contains(req.URL.Path, "/blobs/") {
			return false
		}
		n--
		rec := httptest.NewRecorder()
		if req.Header.Get("Range") != "" {
			r.serveRange(rec, req)
		} else {
			r.inner.ServeHTTP(rec, req)
		}
		for k, v := range rec.Header() {
			w.Header()[k] = v
		}
		w.Header().Set("Content-Length", fmt.Sprint(rec.Body.Len()))
		w.WriteHeader(rec.Code)
		w.Write(rec.Body.Bytes()[:min(after, rec.Body.Len())])
		if f, ok := w.(http.Flusher); ok {
			f.Flush()
		}
		panic(http.ErrAbortHandler)
	})
}

// Replay puts requests back, as if they had just come.
func (r *Registry) Replay(requests []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.requests = append(requests, r.requests...)
}

// Hang answers no request whose path contains part, and cancels ctx when one
// comes.
func Hang(ctx context.Context, cancel context.CancelCauseFunc, cause error, part string) Fault {
	return func(_ http.ResponseWriter, req *http.Request) bool {
		if !strings.Contains(req.URL.Path, part) {
			return false
		}
		cancel(cause)
		<-req.Context().Done()
		return true
	}
}
