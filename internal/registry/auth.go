package registry

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// authorizer finds the Authorization header for requests to one registry. It
// asks for nothing before the registry does, so that a registry without
// authentication costs no extra round trip, and one with tokens costs one for
// each set of scopes.
type authorizer struct {
	host      string
	keychain  authn.Keychain
	transport http.RoundTripper

	mu        sync.Mutex
	tokens    map[string]string // scopes -> header
	basic     string            // header for a registry without tokens
	challenge *transport.Challenge
}

// header returns what is known to work for the scopes, or "". Once the
// registry has said that it wants tokens, it gets one for each new set of
// scopes without being asked again.
func (a *authorizer) header(ctx context.Context, scopes []string) (string, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.basic != "" {
		return a.basic, nil
	}
	key := strings.Join(scopes, " ")
	if h, ok := a.tokens[key]; ok {
		return h, nil
	}
	if a.challenge == nil {
		return "", nil
	}
	return a.exchange(ctx, key, scopes)
}

// answer handles a response with status 401 to a request that had the header
// used. It returns the header to try next, or "" if there is none.
func (a *authorizer) answer(ctx context.Context, resp *http.Response, scopes []string, used string) (string, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	key := strings.Join(scopes, " ")
	if h := a.tokens[key]; h != "" && h != used {
		return h, nil // somebody else has renewed it meanwhile
	}
	scheme, params := parseChallenge(resp.Header.Values("WWW-Authenticate"))
	switch scheme {
	case "bearer":
		a.challenge = &transport.Challenge{Scheme: "bearer", Parameters: params, Insecure: resp.Request.URL.Scheme == "http"}
		return a.exchange(ctx, key, scopes)
	case "basic":
		auth, err := a.credentials(ctx)
		if err != nil {
			return "", err
		}
		h := ""
		switch {
		case auth.Auth != "":
			h = "Basic " + auth.Auth
		case auth.Username != "":
			h = "Basic " + base64.StdEncoding.EncodeToString([]byte(auth.Username+":"+auth.Password))
		}
		if h == used {
			return "", nil
		}
		a.basic = h
		return h, nil
	}
	return "", nil
}

// exchange gets a token for the scopes. a.mu is held.
func (a *authorizer) exchange(ctx context.Context, key string, scopes []string) (string, error) {
	reg, err := a.registry()
	if err != nil {
		return "", err
	}
	auth, err := authn.Resolve(ctx, a.keychain, reg)
	if err != nil {
		return "", fmt.Errorf("credentials for registry %s: %w", a.host, err)
	}
	if cfg, err := authn.Authorization(ctx, auth); err == nil && cfg.RegistryToken != "" {
		a.tokens[key] = "Bearer " + cfg.RegistryToken
		return a.tokens[key], nil
	}
	token, err := transport.Exchange(ctx, reg, auth, a.transport, scopes, a.challenge)
	if err != nil {
		return "", fmt.Errorf("%w: token for registry %s: %w", ErrUnauthorized, a.host, err)
	}
	t := token.Token
	if t == "" {
		t = token.AccessToken
	}
	a.tokens[key] = "Bearer " + t
	return a.tokens[key], nil
}

func (a *authorizer) credentials(ctx context.Context) (*authn.AuthConfig, error) {
	reg, err := a.registry()
	if err != nil {
		return nil, err
	}
	auth, err := authn.Resolve(ctx, a.keychain, reg)
	if err != nil {
		return nil, fmt.Errorf("credentials for registry %s: %w", a.host, err)
	}
	return authn.Authorization(ctx, auth)
}

// registry is the name under which keychains know the registry.
func (a *authorizer) registry() (name.Registry, error) {
	host := a.host
	if host == "docker.io" {
		host = name.DefaultRegistry
	}
	return name.NewRegistry(host)
}

// parseChallenge reads WWW-Authenticate headers (RFC 9110, section 11.6.1) and
// returns the first scheme that is known, in lower case, with its parameters.
func parseChallenge(headers []string) (scheme string, params map[string]string) {
	for _, h := range headers {
		s, rest, _ := strings.Cut(strings.TrimSpace(h), " ")
		s = strings.ToLower(s)
		if s != "bearer" && s != "basic" {
			continue
		}
		params = map[string]string{}
		for rest = strings.TrimSpace(rest); rest != ""; {
			key, after, ok := strings.Cut(rest, "=")
			if !ok {
				break
			}
			var value string
			value, rest = parameterValue(after)
			params[strings.ToLower(strings.Trim(key, " ,"))] = value
		}
		return s, params
	}
	return "", nil
}

// parameterValue reads a token or quoted string and returns what follows it.
func parameterValue(s string) (value, rest string) {
	if !strings.HasPrefix(s, `"`) {
		value, rest, _ = strings.Cut(s, ",")
		return strings.TrimSpace(value), strings.TrimSpace(rest)
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch {
		case s[i] == '\\' && i+1 < len(s):
			i++
			b.WriteByte(s[i])
		case s[i] == '"':
			return b.String(), strings.TrimLeft(s[i+1:], " ,")
		default:
			b.WriteByte(s[i])
		}
	}
	return b.String(), ""
}
