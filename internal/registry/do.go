package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// ErrNotFound is wrapped by errors that say that a registry does not have a
// manifest or blob.
var ErrNotFound = errors.New("not found")

// ErrUnauthorized is wrapped by errors that say that credentials are missing,
// wrong or not sufficient.
var ErrUnauthorized = errors.New("not authorized")

// body is the content of a request. size is -1 if it is not known.
type body struct {
	io.ReadCloser
	size int64
}

// do sends the request, repeats it while that may help, and returns a response
// with one of the status codes that are no error. The caller closes its body.
func (e *endpoint) do(ctx context.Context, r *request) (*http.Response, error) {
	for attempt := 0; ; attempt++ {
		resp, err := e.try(ctx, r)
		if err == nil {
			return resp, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		wait, again := retryAfter(err, attempt)
		if !again || r.once || attempt >= e.client.opts.Retries {
			return nil, err
		}
		if err := sleep(ctx, wait); err != nil {
			return nil, err
		}
	}
}

// try sends the request once, but for finding out scheme and credentials.
func (e *endpoint) try(ctx context.Context, r *request) (*http.Response, error) {
	schemes := e.host.schemes()
	if r.url != nil {
		schemes = []string{r.url.Scheme}
	}
	var failures []error
	for i, scheme := range schemes {
		resp, err := e.authorized(ctx, r, scheme)
		last := i == len(schemes)-1
		if err != nil {
			failures = append(failures, err)
			if last || ctx.Err() != nil || isRefused(err) {
				break
			}
			continue
		}
		if !last && scheme == "http" && wantsTLS(resp) {
			resp.Body.Close()
			continue
		}
		e.host.works(scheme)
		return e.check(resp, r)
	}
	return nil, e.failed(r, errors.Join(failures...))
}

// isRefused reports an error that another scheme would meet too.
func isRefused(err error) bool {
	var dns *net.DNSError
	return errors.Is(err, syscall.ECONNREFUSED) || errors.As(err, &dns)
}

// wantsTLS recognises what servers answer to plain HTTP on a TLS port.
func wantsTLS(resp *http.Response) bool {
	if resp.StatusCode != http.StatusBadRequest {
		return false
	}
	if resp.Request.Method == http.MethodHead {
		return true // no text comes with it
	}
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
	return strings.Contains(string(text), "HTTPS") || strings.Contains(string(text), "HTTP request was sent to")
}

// authorized sends the request, and once more with new credentials if the
// registry asks for them.
func (e *endpoint) authorized(ctx context.Context, r *request, scheme string) (*http.Response, error) {
	header, err := e.host.auth.header(ctx, e.scopes)
	if err != nil {
		return nil, err
	}
	resp, err := e.send(ctx, r, scheme, header)
	if err != nil || resp.StatusCode != http.StatusUnauthorized {
		return resp, err
	}
	renewed, err := e.host.auth.answer(ctx, resp, e.scopes, header)
	if err != nil {
		resp.Body.Close()
		return nil, err
	}
	if renewed == "" {
		return resp, nil
	}
	io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)) // so that the connection can be used again
	resp.Body.Close()
	return e.send(ctx, r, scheme, renewed)
}

func (e *endpoint) send(ctx context.Context, r *request, scheme, authorization string) (*http.Response, error) {
	u := e.url(r, scheme)
	req, err := http.NewRequestWithContext(ctx, r.method, u.String(), nil)
	if err != nil {
		return nil, err
	}
	for k, v := range r.header {
		req.Header[k] = v
	}
	req.Header.Set("User-Agent", e.host.userAgent)
	if r.body != nil {
		b, err := r.body()
		if err != nil {
			return nil, err
		}
		req.Body, req.ContentLength = b, b.size
		if b.size == 0 {
			b.Close()
			req.Body = http.NoBody
		}
	}
	client := &http.Client{Transport: &signer{e.host, authorization}}
	return client.Do(req)
}

// signer adds credentials to requests for the registry itself: not to those
// that it redirects to a store of someone else.
type signer struct {
	host          *host
	authorization string
}

func (s *signer) RoundTrip(req *http.Request) (*http.Response, error) {
	if s.authorization != "" && req.URL.Host == s.host.address {
		req = req.Clone(req.Context())
		req.Header.Set("Authorization", s.authorization)
	}
	return s.host.transport.RoundTrip(req)
}

// check turns a response that is an error into one.
func (e *endpoint) check(resp *http.Response, r *request) (*http.Response, error) {
	if slices.Contains(r.accept, resp.StatusCode) {
		return resp, nil
	}
	defer resp.Body.Close()
	err := transport.CheckError(resp, r.accept...)
	var te *transport.Error
	if errors.As(err, &te) {
		te.Request = nil // failed names what was asked for, in words
	}
	se := &statusError{code: resp.StatusCode, err: err}
	if s := resp.Header.Get("Retry-After"); s != "" {
		if n, err := strconv.Atoi(s); err == nil {
			se.retryAfter = time.Duration(n) * time.Second
		}
	}
	return nil, e.failed(r, se)
}

// failed says of which request err is.
func (e *endpoint) failed(r *request, err error) error {
	what := r.path
	if what == "" && r.url != nil {
		what = "blobs/uploads"
	}
	return fmt.Errorf("%s %s of %s: %w", r.method, what, e.repo, err)
}

// statusError is an answer that is an error.
type statusError struct {
	code       int
	err        error
	retryAfter time.Duration
}

func (e *statusError) Error() string {
	var te *transport.Error
	silent := errors.As(e.err, &te) && len(te.Errors) == 0
	switch {
	case e.code == http.StatusUnauthorized || e.code == http.StatusForbidden:
		return fmt.Sprintf("%v: %v", ErrUnauthorized, e.err)
	case e.code == http.StatusNotFound && silent: // an answer to HEAD has no text
		return ErrNotFound.Error()
	}
	return e.err.Error()
}

func (e *statusError) Unwrap() []error {
	switch e.code {
	case http.StatusNotFound:
		return []error{ErrNotFound, e.err}
	case http.StatusUnauthorized, http.StatusForbidden:
		return []error{ErrUnauthorized, e.err}
	}
	return []error{e.err}
}

// firstWait is doubled with each repetition; a third of it is random, so that
// many builders do not come back at once.
const (
	firstWait = 200 * time.Millisecond
	maxWait   = 30 * time.Second
)

// retryAfter reports whether err may pass, and how long to wait for that.
func retryAfter(err error, attempt int) (time.Duration, bool) {
	wait := min(firstWait<<attempt, maxWait)
	wait += time.Duration(rand.Int64N(int64(wait) / 3))
	var se *statusError
	if errors.As(err, &se) {
		if se.retryAfter > 0 {
			wait = min(se.retryAfter, maxWait)
		}
		return wait, se.code == http.StatusTooManyRequests || se.code == http.StatusRequestTimeout || se.code >= 500 && se.code != http.StatusNotImplemented
	}
	var ne net.Error
	var dns *net.DNSError
	switch {
	case errors.As(err, &dns) && dns.IsNotFound:
		return 0, false
	case errors.As(err, &ne), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		// A registry that is not there at all is worth less patience.
		return wait, !errors.Is(err, syscall.ECONNREFUSED) || attempt < 2
	}
	return 0, false
}
