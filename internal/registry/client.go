package registry

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
)

// Options say how registries are reached. The zero value works.
type Options struct {
	// PlainHTTP allows http for all registries, where TLS does not work, and
	// PlainHTTPHosts for those named. Loopback addresses are always allowed it.
	PlainHTTP      bool
	PlainHTTPHosts []string
	// SkipVerify accepts any TLS certificate, SkipVerifyHosts from those named.
	SkipVerify      bool
	SkipVerifyHosts []string
	// Certificates maps a host to a PEM file with authorities that are trusted
	// for it beside the system's.
	Certificates map[string]string
	// ClientCertificates maps a host to the files of a certificate and its key.
	ClientCertificates map[string][2]string
	// Keychain finds credentials; nil is Docker's config file and the helpers
	// that it names.
	Keychain authn.Keychain
	// Retries is how often a request is repeated that failed for a reason
	// which may pass. Negative is never; 0 is 4, with waits of 0.2, 0.4, 0.8
	// and 1.6 s.
	Retries int
	// UserAgent is sent with every request.
	UserAgent string
}

func (o Options) withDefaults() Options {
	if o.Keychain == nil {
		o.Keychain = authn.DefaultKeychain
	}
	switch {
	case o.Retries == 0:
		o.Retries = 4
	case o.Retries < 0:
		o.Retries = 0
	}
	if o.UserAgent == "" {
		o.UserAgent = "ondol"
	}
	return o
}

// A Client talks to any number of registries. It keeps connections and tokens
// and is safe for concurrent use.
type Client struct {
	opts  Options
	mu    sync.Mutex
	hosts map[string]*host
}

// NewClient returns a client. It fails if a certificate cannot be read.
func NewClient(opts Options) (*Client, error) {
	c := &Client{opts: opts.withDefaults(), hosts: map[string]*host{}}
	for name := range c.opts.Certificates {
		if _, err := c.tlsConfig(name); err != nil {
			return nil, err
		}
	}
	for name := range c.opts.ClientCertificates {
		if _, err := c.tlsConfig(name); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// host is one registry.
type host struct {
	name      string // as names spell it
	address   string // host and port of its URLs
	plain     plainHTTP
	transport http.RoundTripper
	userAgent string
	auth      *authorizer

	mu     sync.Mutex
	scheme string // what has worked
}

// plainHTTP says when a registry may be spoken to without TLS.
type plainHTTP int

const (
	plainNever    plainHTTP = iota
	plainFallback           // if TLS does not work
	plainFirst              // and TLS if the other side wants it
)

func (c *Client) host(name string) (*host, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if h, ok := c.hosts[name]; ok {
		return h, nil
	}
	config, err := c.tlsConfig(name)
	if err != nil {
		return nil, err
	}
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.TLSClientConfig = config
	t.MaxIdleConnsPerHost = 16
	t.ResponseHeaderTimeout = 2 * time.Minute // not forever, if the other side is gone
	address := name
	if name == "docker.io" {
		address = "registry-1.docker.io"
	}
	h := &host{name: name, address: address, plain: c.plainHTTP(name), transport: t, userAgent: c.opts.UserAgent}
	h.auth = &authorizer{host: name, keychain: c.opts.Keychain, transport: t, tokens: map[string]string{}}
	c.hosts[name] = h
	return h, nil
}

func (c *Client) plainHTTP(name string) plainHTTP {
	bare := name
	if h, _, err := net.SplitHostPort(name); err == nil {
		bare = h
	}
	ip := net.ParseIP(strings.Trim(bare, "[]"))
	switch {
	case slices.Contains(c.opts.PlainHTTPHosts, name), bare == "localhost", ip != nil && ip.IsLoopback():
		return plainFirst
	case c.opts.PlainHTTP, strings.HasSuffix(bare, ".local"), strings.HasSuffix(bare, ".localhost"), ip != nil && ip.IsPrivate():
		return plainFallback
	}
	return plainNever
}

func (c *Client) tlsConfig(name string) (*tls.Config, error) {
	config := &tls.Config{InsecureSkipVerify: c.opts.SkipVerify || slices.Contains(c.opts.SkipVerifyHosts, name)} // asked for
	if file, ok := c.opts.Certificates[name]; ok {
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		pem, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("certificate for registry %s: %w", name, err)
		}
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("certificate for registry %s: no certificate in %s", name, file)
		}
		config.RootCAs = pool
	}
	if files, ok := c.opts.ClientCertificates[name]; ok {
		pair, err := tls.LoadX509KeyPair(files[0], files[1])
		if err != nil {
			return nil, fmt.Errorf("client certificate for registry %s: %w", name, err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}

// schemes returns what to try, in order.
func (h *host) schemes() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.scheme != "":
		return []string{h.scheme}
	case h.plain == plainFirst:
		return []string{"http", "https"}
	case h.plain == plainFallback:
		return []string{"https", "http"}
	}
	return []string{"https"}
}

func (h *host) works(scheme string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.scheme = scheme
}

// endpoint is a repository with the rights that a caller needs there.
type endpoint struct {
	client *Client
	host   *host
	repo   Repository
	scopes []string
}

// pullFrom returns the endpoint for reading from repo.
func (c *Client) pullFrom(repo Repository) (*endpoint, error) {
	return c.endpoint(repo, "repository:"+repo.Path+":pull")
}

// pushTo returns the endpoint for writing to repo, and for mounting blobs from
// other repositories of the same registry.
func (c *Client) pushTo(repo Repository, from ...Repository) (*endpoint, error) {
	scopes := []string{"repository:" + repo.Path + ":pull,push"}
	for _, f := range from {
		if f.Host == repo.Host && f.Path != repo.Path {
			scopes = append(scopes, "repository:"+f.Path+":pull")
		}
	}
	return c.endpoint(repo, scopes...)
}

func (c *Client) endpoint(repo Repository, scopes ...string) (*endpoint, error) {
	h, err := c.host(repo.Host)
	if err != nil {
		return nil, err
	}
	return &endpoint{c, h, repo, scopes}, nil
}

// request is one HTTP request to a registry, which may be sent several times.
type request struct {
	method string
	path   string     // below /v2/<repository>/
	url    *url.URL   // instead of path, where the registry has given one
	query  url.Values // added to it
	header http.Header
	body   func() (body, error) // nil for none
	accept []int                // status codes that are no error
	once   bool                 // not to be repeated by do
}

// url returns where the request goes, with a scheme.
func (e *endpoint) url(r *request, scheme string) *url.URL {
	u := &url.URL{Scheme: scheme, Host: e.host.address, Path: "/v2/" + e.repo.Path + "/" + r.path}
	if r.url != nil {
		v := *r.url
		u = &v
	}
	if len(r.query) > 0 {
		q := u.Query()
		for k, v := range r.query {
			q[k] = v
		}
		u.RawQuery = q.Encode()
	}
	return u
}

// sleep waits for d or until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
