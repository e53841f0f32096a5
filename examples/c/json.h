/* As much of JSON as adapter.c needs. A Json is a piece of text; nothing is copied, and nothing is read beyond its end. */

#ifndef JSON_H
#define JSON_H

#include <ctype.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct { const char *at, *end; } Json;

enum { JSON_DEPTH = 16 };

static inline void json_space(Json *text) {
    while (text->at < text->end && isspace((unsigned char)*text->at)) text->at++;
}

/* Takes one character off the front, if it is there. */
static inline bool json_eat(Json *text, char c) {
    json_space(text);
    if (text->at == text->end || *text->at != c) return false;
    text->at++;
    return true;
}

static inline bool json_in_word(char c) { return isalnum((unsigned char)c) || c == '+' || c == '-' || c == '.'; }

static inline bool json_eat_string(Json *text) {
    if (!json_eat(text, '"')) return false;
    for (; text->at < text->end && *text->at != '"'; text->at++)
        if (*text->at == '\\' && ++text->at == text->end) return false;
    return json_eat(text, '"');
}

/* Takes a value off the front of the text; false if there is none, or it is malformed or too deep. */
static inline bool json_eat_value(Json *text, Json *value, int depth) {
    json_space(text);
    const char *start = text->at;
    if (start == text->end || depth > JSON_DEPTH) return false;
    if (*start == '"') {
        if (!json_eat_string(text)) return false;
    } else if (*start == '{' || *start == '[') {
        const char close = *start == '{' ? '}' : ']';
        text->at++;
        if (!json_eat(text, close)) {
            do {
                Json item;
                if (close == '}' && !(json_eat_string(text) && json_eat(text, ':'))) return false;
                if (!json_eat_value(text, &item, depth + 1)) return false;
            } while (json_eat(text, ','));
            if (!json_eat(text, close)) return false;
        }
    } else { /* a number, true, false or null: whoever uses it looks at it */
        while (text->at < text->end && json_in_word(*text->at)) text->at++;
        if (text->at == start) return false;
    }
    *value = (Json){start, text->at};
    return true;
}

/* Whether a whole text is one object. The functions below want parts of such a text. */
static inline bool json_object(Json text, Json *object) {
    if (!json_eat_value(&text, object, 0) || *object->at != '{') return false;
    json_space(&text);
    return text.at == text.end;
}

static inline bool json_is(Json value, const char *text) {
    size_t length = strlen(text);
    return value.at != NULL && (size_t)(value.end - value.at) == length && memcmp(value.at, text, length) == 0;
}

/* What is between the brackets, for json_next; nothing where there are none. */
static inline Json json_inside(Json value, char open) {
    if (value.at == NULL || *value.at != open) return (Json){NULL, NULL};
    return (Json){value.at + 1, value.end - 1};
}

/* Takes the next item, or member with its key in quotation marks, off the front. */
static inline bool json_next(Json *inside, Json *key, Json *value) {
    if (inside->at == NULL) return false;
    json_eat(inside, ',');
    json_space(inside);
    if (key != NULL) {
        key->at = inside->at;
        if (!json_eat_string(inside)) return false;
        key->end = inside->at;
        json_eat(inside, ':');
    }
    return json_eat_value(inside, value, 0);
}

/* The member of an object whose key, in quotation marks, is given; {NULL, NULL} if there is none. */
static inline Json json_get(Json object, const char *quoted) {
    Json inside = json_inside(object, '{'), key, value;
    while (json_next(&inside, &key, &value))
        if (json_is(key, quoted)) return value;
    return (Json){NULL, NULL};
}

/* A whole number. */
static inline bool json_size(Json value, size_t *number) {
    *number = 0;
    if (value.at == NULL) return false;
    for (const char *at = value.at; at < value.end; at++) {
        if (*at < '0' || *at > '9' || *number > (SIZE_MAX - 9) / 10) return false;
        *number = *number * 10 + (size_t)(*at - '0');
    }
    return true;
}

#endif
